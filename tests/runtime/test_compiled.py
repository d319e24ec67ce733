"""`compile`: the same function, one contract, and no wrong number in silence."""

import copy
import threading
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

import horsepower
from horsepower.runtime.models.dit import FourierRope, Layer
from models import TINY, VARIANTS, compiled, random_inputs, random_model, variant
from recordings import relative_error


@pytest.fixture(scope="module")
def tiny():
    model = random_model(TINY)
    return model, compiled(model, {"fuse_qkv": 3, "fuse_gate": 3, "fuse_activation": 3, "fuse_add_norm": 5})


def both(model, run, frames, tokens, audio, text):
    inputs = (*random_inputs(model.config, frames, tokens, audio, text), frames)
    with torch.no_grad():
        return run(*inputs), model(*inputs)


@cache
def three(name):
    """A model, the exact one with its weights, and the compiled one."""
    model = random_model(variant(name))
    exact = random_model(replace(variant(name), params_dtype=torch.float64), torch.float64)
    exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    return model, exact, compiled(model)


LENGTHS = [(4, 7, 13, 9), (1, 1, 1, 1), (2, 3, 0, 6), (3, 2, 5, 0), (1, 5, 0, 0), (7, 1, 1, 0), (5, 16, 20, 11)]


@pytest.mark.parametrize("name", VARIANTS)
def test_no_further_from_float64_than_eager(name):
    """All lengths together: of a row or two alone, rounding makes a lottery."""
    model, exact, run = three(name)
    results: list[list[torch.Tensor]] = [[], [], []]
    for frames, *others in LENGTHS:
        inputs = random_inputs(model.config, frames, *others)
        with torch.no_grad():
            fused, eager = run(*inputs, frames), model(*inputs, frames)
            truth = exact(*(x.double() for x in inputs), frames)
        for got, rounded in zip(fused, eager, strict=True):
            assert (got.shape, got.dtype) == (rounded.shape, rounded.dtype)
        for collected, outputs in zip(results, (fused, eager, truth), strict=True):
            collected.extend(x.flatten() for x in outputs)
    fused, eager, truth = map(torch.cat, results)
    assert relative_error(fused, truth) <= max(1.1 * relative_error(eager, truth), 4 * 2.0**-8)


def test_inputs_that_break_the_contract_are_named(tiny):
    _, run = tiny
    *parts, coords = random_inputs(TINY, 3, 2, 5, 4)
    for inputs, message in (
        ((*parts, coords[:-1], 3), "coords: got a size of 14, allowed: 15"),
        ((*parts, coords.double(), 3), "coords: got .* torch.float64 on cpu, allowed: .*float32"),
        ((parts[0][:, :7], *parts[1:], coords, 3), "video: got a size of 7, allowed: 8"),
        ((parts[0][0], *parts[1:], coords, 3), "video: got"),
        ((*parts, coords, 3.0), "frames: got 3.0, allowed: an integer"),
        ((*parts, coords, True), "frames: got True, allowed: an integer"),
        ((*parts, None, 3), "inputs: got|coords: got NoneType, allowed: a tensor"),
        ((*parts, coords), "inputs: got 4 arguments"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*inputs)
    with pytest.raises(ValueError, match="inputs: got"):
        run(*parts, coords, frames=3)
    with pytest.raises(ValueError, match="frames: got 4 for 6"):
        compiled(random_model(variant("windowed")))(*parts, coords, 4)


def test_outputs_belong_to_the_caller(tiny):
    model, run = tiny
    first, want = both(model, run, 3, 2, 5, 4)
    kept = [x.clone() for x in first]
    first[0].zero_()
    second, _ = both(model, run, 3, 2, 5, 4)
    assert torch.equal(second[0], kept[0])
    assert torch.equal(second[1], kept[1])
    assert max(map(relative_error, second, want)) < 0.02


def test_an_input_or_a_weight_that_is_returned_is_a_copy():
    class Returns(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x, self.weight, x[1:], x + 1

    module, x = Returns(), torch.arange(3.0)
    out = horsepower.compile(module, (x,))(x)
    for each in out:
        each.detach().fill_(9)
    assert x.tolist() == [0, 1, 2]
    assert module.weight.tolist() == [1, 1, 1]


def test_threads_share_a_plan(tiny):
    model, run = tiny
    shapes = [(3, 2, 5, 4), (4, 3, 1, 2), (2, 7, 3, 0), (1, 1, 0, 1)]
    alone = [both(model, run, *shape)[0] for shape in shapes]
    wrong = []

    def work(shape, want):
        for _ in range(10):
            got, _ = both(model, run, *shape)
            wrong.extend(1 for a, b in zip(got, want, strict=True) if not torch.equal(a, b))

    workers = [threading.Thread(target=work, args=pair) for pair in zip(shapes, alone, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def _replaced(model):
    model.final_linear_video.weight = torch.nn.Parameter(model.final_linear_video.weight.clone())


def _layer_swapped(model):
    model.block.layers[1] = copy.deepcopy(model.block.layers[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.block.layers[1].mlp.down_proj.weight.data.mul_(2), None),
        (
            lambda m: m.block.layers[1].mlp.down_proj.weight.mul_(2),
            r"layers\.1\.mlp\.down_proj\.weight: changed",
        ),
        (lambda m: m.adapter.rope.bands.add_(1), r"adapter\.rope\.bands: changed"),
        (_replaced, r"final_linear_video\.weight: changed"),
        (lambda m: setattr(m.block.layers[2].attention, "local", True), r"block\.layers\.2\.attention\.local: changed"),
        (lambda m: setattr(m.block.layers[0].mlp, "activation", torch.relu), r"layers\.0\.mlp\.activation: changed"),
        (lambda m: m.train(), "training: changed"),
        (_layer_swapped, "submodule changed"),
        (lambda m: m.float(), r"weight: changed"),
        (lambda m: setattr(m.final_linear_video.weight, "data", m.final_linear_video.weight.data.clone()), "changed"),
        (lambda m: setattr(m.block.layers[1], "forward", lambda h, *_: h), r"block\.layers\.1: got another attribute"),
        (lambda m: m.block.register_forward_hook(lambda *_: None), "a hook changed"),
        (lambda m: setattr(m.block.layers[0].attention, "experts", 3.0), r"attention\.experts: changed"),
    ],
)
def test_a_model_changed_after_compiling_raises(change, message):
    model = random_model(TINY)
    run = compiled(model)
    both(model, run, 3, 2, 5, 4)
    with torch.no_grad():
        change(model)
    if message is None:  # a change through .data leaves no trace in torch: what the plan reads is the same memory
        got, want = both(model, run, 3, 2, 5, 4)
        assert max(map(relative_error, got, want)) < 0.02
        return
    with pytest.raises(RuntimeError, match=message):
        both(model, run, 3, 2, 5, 4)


class Configured(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config, self.sizes, self.table = SimpleNamespace(scale=2.0), ([2],), torch.ones(3)

    def forward(self, x):
        return x * self.config.scale + self.sizes[0][0] + self.table


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.config, "scale", 3.0),
        lambda m: m.sizes[0].append(1),
        lambda m: m.table.mul_(2),
        lambda m: setattr(m, "table", torch.ones(3)),
    ],
)
def test_what_attributes_hold_is_watched(change):
    module, x = Configured(), torch.ones(3)
    run = horsepower.compile(module, (x,))
    assert run(x).tolist() == [5, 5, 5]
    change(module)
    with pytest.raises(RuntimeError, match="changed after compiling"):
        run(x)


def test_a_copy_of_the_model_is_its_own(tiny):
    model, run = tiny
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.final_linear_video.weight.zero_()
    got, want = both(model, run, 3, 2, 5, 4)
    assert max(map(relative_error, got, want)) < 0.02
    assert not both(twin, compiled(twin), 3, 2, 5, 4)[0][0].any()


def test_a_fusion_that_is_expected_and_fails_is_an_error():
    with pytest.raises(ValueError, match=r"expect: got 5 sites of fuse_add_norm, allowed: 6\. Refused: none"):
        compiled(random_model(TINY), {"fuse_add_norm": 6})


def test_the_plan_can_be_read(tiny):
    text = str(tiny[1].plan)
    assert text.startswith("inputs  %video, %audio, %text, %coords, %frames")
    assert "block.layers.1.attention" in text
    assert text.count("horsepower.add_rms_norm.default(") == 5


def test_what_weights_alone_decide_is_computed_once(tiny):
    _, run = tiny
    weights = {weight.value for weight in run.plan.weights}
    assert any("add" in call.target for call in run.plan.loads)
    made = {call.result for call in run.plan.loads}
    for call in run.plan.calls:
        sources = {value.name for value in call.args if hasattr(value, "name")}
        assert not sources or not sources <= weights | made


def test_a_missing_weight_is_named(tiny):
    from horsepower.runtime.executor import Executor

    with pytest.raises(ValueError, match="weights: .* is missing"):
        Executor(tiny[1].plan, {})


def test_a_layer_alone():
    config = variant("windowed")
    layer, counts = random_model(config).block.layers[0], (6, 5, 4)
    rope = FourierRope(16, torch.float32, "cpu")(random_inputs(config, 3, 2, 5, 4)[3])
    h = torch.randn(15, 64)
    run = horsepower.compile(layer, (h, rope, counts, 3))
    assert isinstance(layer, Layer)
    with torch.no_grad():
        assert relative_error(run(h, rope, counts, 3), layer(h, rope, counts, 3)) < 5e-3
    with pytest.raises(ValueError, match="got 4, allowed: 3, as compiled"):
        run(h, rope, counts, 4)
