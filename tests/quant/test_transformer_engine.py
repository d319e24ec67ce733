"""The bridge to Transformer Engine beside a stand-in for it, which checks what the package would ask for."""

import sys
from dataclasses import replace

import pytest
import torch
import transformer_engine_twin

from horsepower.quant import transformer_engine
from horsepower.quant.scheme import TE, TE_BLOCK, TE_DELAYED
from horsepower.runtime.engine import Engine
from horsepower.runtime.executor import weights_of
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit import Linear as DiTLinear
from horsepower.runtime.presets import FOAL, FOAL_MODELS
from horsepower.runtime.request import Request
from horsepower.runtime.te_dit import TEDiT
from models import TINY, random_inputs, random_model
from recordings import relative_error

CPU = torch.device("cpu")


@pytest.fixture
def te(monkeypatch):
    return transformer_engine_twin.install(monkeypatch)


def converted(model, scheme, *learned, learning=False):
    return TEDiT(model.config, weights_of(model), CPU, torch.bfloat16, scheme, *learned, learning=learning)


@pytest.mark.parametrize("scheme", [TE, TE_BLOCK.keeping(["block.layers.1.*"])], ids=["te", "te-block"])
def test_every_layer_that_is_not_kept_is_the_library_s(te, scheme):
    """Experts, odd token counts, an empty modality; widths that are no multiple of 16."""
    model = random_model(TINY)
    twin = converted(model, scheme)
    kept = 4 if scheme.keep else 0
    left = [path for path, each in twin.named_modules() if type(each) is DiTLinear]
    assert left == [f"block.layers.1.{each}" for each in (
        "attention.linear_qkv", "attention.linear_proj", "mlp.up_gate_proj", "mlp.down_proj")][:kept]  # fmt: skip
    assert {recipe for recipe, _ in te.made} == {transformer_engine.RECIPES[scheme.recipe][0]}
    assert len(te.made) == 2 * 4 * 3 + (0 if kept else 4)
    assert not any(each.training for each in twin.modules())
    for audio in (5, 0):
        given = (*random_inputs(TINY, 3, 3, audio, 4), 3)
        with torch.no_grad():
            for one, other in zip(twin(*given), model(*given), strict=True):
                torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_scales_move_while_a_model_learns_and_then_stay(te):
    model = random_model(TINY)
    steps = [(*(size * x for x in random_inputs(TINY, 3, 3, 5, 4)[:3]), random_inputs(TINY, 3, 3, 5, 4)[3], 3)
             for size in (1, 4, 1)]  # fmt: skip
    learner = converted(model, TE_DELAYED, learning=True)
    first, *_ = (layer for _, layer in te.made)
    with torch.no_grad():
        for i, step in enumerate(steps):
            assert first.moves == i  # once a step, however many layers there are
            learner(*step)
    assert not any(layer.eight for _, layer in te.made)
    assert all(layer.scales[0] == 448 / (2 * layer.largest[0]) != 1 for _, layer in te.made)
    learned, count = learner.learned(), len(te.made)
    frozen = converted(model, TE_DELAYED, learned)
    layers = [layer for _, layer in te.made[count:]]
    assert all(layer.eight and not layer.training for layer in layers)
    before = [list(layer.scales) for layer in layers]
    assert before == [layer.scales for _, layer in te.made[:count]]
    with torch.no_grad():
        got = frozen(*steps[0])
        frozen(*(100 * x for x in steps[0][:3]), *steps[0][3:])
        again, want = frozen(*steps[0]), model(*steps[0])
    assert [layer.scales for layer in layers] == before
    assert all(map(torch.equal, got, again))
    assert all(0.01 < relative_error(one, other) < 0.1 for one, other in zip(got, want, strict=True))


def test_a_model_goes_on_learning_where_another_left_off(te):
    model = random_model(TINY)
    large, small = ((*(size * x for x in random_inputs(TINY, 3, 3, 5, 4)), 3) for size in (4, 1))
    through, first = (converted(model, TE_DELAYED, learning=True) for _ in range(2))
    with torch.no_grad():
        for step in (large, small):
            through(*step)
        first(*large)
        second = converted(model, TE_DELAYED, first.learned(), learning=True)
        second(*small)
    assert str(second.learned()) == str(through.learned()) != str(first.learned())


@pytest.fixture
def hopper(te, monkeypatch):
    """An engine of the preset, of two layers, for a GPU that the CPU plays."""
    small = replace(FOAL, num_layers=2, hidden_size=64, head_dim=16, mm_layers=(0,), gelu7_layers=(0,))
    monkeypatch.setattr("horsepower.runtime.foal.FOAL_MODELS", FOAL_MODELS | {"distill": small, "540p_sr": small})
    monkeypatch.setattr("horsepower.runtime.asked.target_of", lambda device: "sm_90")
    return Engine.from_pretrained("foal", device="cpu", scheme="te-delayed")


HORSE, ROAD = (
    Request(prompt=x, duration=0.2, resolution=(64, 32), num_inference_steps=2) for x in ("a horse", "a road")
)


def test_an_engine_is_calibrated_by_requests_and_by_nothing_else(te, hopper):
    with pytest.raises(ValueError, match="scheme: got te-delayed before distill was calibrated, allowed: after Engine"):
        hopper.run(HORSE)
    assert not any(layer.ran for _, layer in te.made)
    learners = [layer for _, layer in te.made]
    hopper.calibrate([ROAD, HORSE])
    assert all(layer.ran == layer.moves == 4 for layer in learners)  # two requests of two steps
    first = hopper.run(HORSE)
    layers = [layer for _, layer in te.made[len(learners) :]]
    scales = [list(layer.scales) for layer in layers]
    assert scales == [layer.scales for layer in learners]
    assert all(layer.eight and layer.ran for layer in layers)
    hopper.run(ROAD)
    hopper._parts.forget("distill")  # as when it gives way to another part
    again = hopper.run(HORSE)
    assert torch.equal(first.video, again.video)
    assert torch.equal(first.audio, again.audio)
    assert scales == [layer.scales for _, layer in te.made[-len(scales) :]]
    assert any(note.startswith("scheme: te-delayed") for note in again.notes)
    wide = replace(HORSE, resolution="540p")
    with pytest.raises(ValueError, match="scheme: got te-delayed before 540p_sr was calibrated"):
        hopper.run(wide)
    hopper.calibrate([ROAD])
    hopper.run(HORSE)
    assert scales != [layer.scales for _, layer in te.made[-len(scales) :]]  # of the road alone


def test_what_a_calibration_refuses(hopper, monkeypatch):
    for requests, message in (
        ([], r"requests: got \[\], allowed: a list of them"),
        (HORSE, "requests: got Request.*, allowed: a list of them"),
        ([HORSE, "a horse"], "request: got str, allowed: a Request"),
        ([replace(HORSE, guidance=2.0)], "guidance: got 2.0, allowed: None with the distilled model"),
    ):
        with pytest.raises(ValueError, match=message):
            hopper.calibrate(requests)
    hopper.calibrate([HORSE])
    first = hopper.run(HORSE)
    monkeypatch.setattr("horsepower.runtime.job.super_resolve", None)  # fails at the first clip that asks for it
    with pytest.raises(TypeError):
        hopper.calibrate([ROAD, replace(HORSE, resolution="540p")])
    assert torch.equal(hopper.run(HORSE).video, first.video)  # what was known before stays
    plain = Engine.from_pretrained("foal", device="cpu", mode="eager")
    with pytest.raises(ValueError, match="calibrate: got an engine of scheme none, allowed: te-delayed"):
        plain.calibrate([HORSE])


def test_a_package_that_is_too_old(te):
    del te.pytorch.quantized_model_init
    with pytest.raises(ValueError, match=r"scheme: got te, allowed: Transformer Engine 2\.20 or newer"):
        transformer_engine.library()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    model = DiT(TINY, device="meta")
    with pytest.raises(ValueError, match="scheme: got te, allowed: where Transformer Engine is installed"):
        transformer_engine.convert(model, DiTLinear, lambda path: None, TE)
    assert sum(isinstance(each, DiTLinear) for each in model.modules()) == 12  # nothing was replaced


@pytest.mark.parametrize(
    ("scheme", "mode", "message"),
    [
        ("te", None, "scheme: got te for cpu, which cannot compute it, allowed: fp8-weights"),
        ("te", "fused", "scheme: got te with mode fused, allowed: with mode eager"),
        ("fp8-weights", "eager", "scheme: got fp8-weights with mode eager, allowed: with mode fused"),
        ("fp8", None, "scheme: got fp8 for cpu, which cannot compute it"),
        ("int8", None, "scheme: got 'int8', allowed: fp8, "),
    ],
)
def test_what_an_engine_refuses(scheme, mode, message):
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained("foal", device="cpu", mode=mode, scheme=scheme)
    with pytest.raises(ValueError, match=r"scheme: got fp8-weights with torch\.float32, allowed: with torch\.bfloat16"):
        Engine.from_pretrained("foal", device="cpu", dtype=torch.float32, scheme="fp8-weights")
