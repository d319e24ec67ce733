"""Checkpoints of eight bits: the same bits as when quantised while loaded, and clear about what is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from horsepower import Engine, Request
from horsepower.bench.live import live_peak
from horsepower.graph.passes import PASSES
from horsepower.graph.passes.lower import lower
from horsepower.quant.quantised import Quantised, quantise
from horsepower.quant.scheme import FP8_TENSOR, SCHEMES, Scheme
from horsepower.runtime import quantised_checkpoint
from horsepower.runtime.checkpoint import INDEX, MANIFEST, SINGLE
from horsepower.runtime.executor import Executor, weights_of
from horsepower.runtime.foal import Foal, StoredFoal
from horsepower.runtime.fused import FusedDiT, plan_velocity
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.presets import FOAL_MODELS
from horsepower.runtime.quantised_checkpoint import (
    KEY,
    SCALE,
    VERSION,
    Stored,
    digest,
    new_folder,
    scales_of,
    write,
)
from models import random_inputs, random_model

CPU = torch.device("cpu")
CONFIG = replace(FOAL_MODELS["distill"], num_layers=3, hidden_size=64, head_dim=16, mm_layers=(0, 2), gelu7_layers=(0,))
DOWN, QKV = "block.layers.1.mlp.down_proj.weight", "block.layers.0.attention.linear_qkv.weight"
KEEP = ("block.layers.1.mlp.down_proj",)
REQUEST = Request(prompt="a horse", duration=0.2, resolution=(64, 32), num_inference_steps=1)


LARGEST = {
    f"block.layers.{i}.{leaf}": 3.0 + i
    for i in range(3)
    for leaf in ("attention.linear_qkv", "attention.linear_proj", "mlp.up_gate_proj", "mlp.down_proj")
}
FROZEN = FP8_TENSOR.calibrated({layer: x for layer, x in LARGEST.items() if layer not in KEEP})


def stored(keep=(), scheme="fp8", **changes):
    said = Stored("distill", digest(CONFIG), scheme, tuple(keep), 0.06, None, "foal")
    return replace(said, **changes)


def plan_of(scheme, keep=()):
    """For the CPU's own kernels, or as a GPU's, which the plain operators run."""
    chosen = FROZEN if scheme == "fp8-tensor" else SCHEMES[scheme]
    only = PASSES if "cpu" in chosen.targets else [each for each in PASSES if each is not lower]
    target = None if "cpu" in chosen.targets else "sm_90"
    return plan_velocity(DiT(CONFIG, device="meta"), CPU, only=only, scheme=chosen.keeping(keep), target=target)


def written(folder, weights=None, keep=(), **changes):
    """A checkpoint of the preset; weights: other values than its own."""
    said = stored(keep, **changes)
    scales = scales_of(plan_of("fp8-tensor" if said.scheme == "fp8-tensor" else "fp8-weights", keep))
    with new_folder(folder) as draft:
        write(draft / "distill", CONFIG, weights or weights_of(random_model(CONFIG)), scales, said)
    return folder


def values(folder):
    return StoredFoal(folder, CPU, torch.bfloat16).weights("distill")


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "quantised")


def altered(folder, **changes):
    """Change tensors or, with KEY, what is said of them; the manifest goes."""
    file = folder / "distill" / SINGLE
    said = changes.pop("said", stored().metadata())
    save_file(load_file(file) | changes.pop("tensors", {}), file, said)
    (folder / "distill" / MANIFEST).unlink()


@pytest.mark.parametrize(("scheme", "keep"), [("fp8-weights", ()), ("fp8", KEEP), ("fp8-tensor", KEEP)])
def test_both_ways_give_the_same_bits(tmp_path, scheme, keep):
    model, meta, plan = random_model(CONFIG), DiT(CONFIG, device="meta"), plan_of(scheme, keep)
    loaded = FusedDiT(meta, plan=plan, weights=weights_of(model))
    how = {"scheme": scheme, "largest": FROZEN.largest if scheme == "fp8-tensor" else ()}
    folder = written(tmp_path / "quantised", weights_of(model), keep, **how)
    read = FusedDiT(meta, plan=plan, weights=values(folder))
    assert Stored.of(folder / "distill").scheme_for(None) == replace(SCHEMES[scheme], keep=keep, largest=how["largest"])
    *parts, coords = random_inputs(CONFIG, 3, 4, 5, 6)
    with torch.no_grad():
        condition = loaded.condition(parts[2], coords)
        got, want = (each.velocity(*parts[:2], condition, 3) for each in (read, loaded))
        plain = model.velocity(*parts[:2], condition, 3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_a_load_holds_half_the_bytes(tmp_path):
    plan, weights = plan_of("fp8-weights"), weights_of(random_model(CONFIG))
    read, kept = values(written(tmp_path / "quantised", weights)), []
    held = live_peak(lambda: kept.append(Executor(plan, read)))
    eight = scales_of(plan)
    others = sum(x.nbytes for name, x in weights.items() if name not in eight)
    assert held - others < 0.65 * sum(weights[name].nbytes for name in eight)
    assert held >= plan.weight_bytes


def test_what_the_files_hold(tmp_path):
    folder = written(tmp_path / "quantised", keep=KEEP) / "distill"
    tensors, model = load_file(folder / SINGLE), random_model(CONFIG)
    linears = {name for name, value in model.named_parameters() if value.dtype == torch.bfloat16}
    assert len(linears) == 12
    assert set(tensors) == {*weights_of(model), *(name + SCALE for name in linears - {DOWN})}
    for name, value in weights_of(model).items():
        if name in linears - {DOWN}:
            codes, scales = quantise(value, len(value))
            assert torch.equal(tensors[name].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(tensors[name + SCALE], scales)
        else:
            assert torch.equal(tensors[name], value)
    whole = sum(weights_of(model)[name].nbytes for name in linears - {DOWN})
    eight = sum(tensors[name].nbytes + tensors[name + SCALE].nbytes for name in linears - {DOWN})
    assert eight < 0.54 * whole  # a scale is 4 bytes of rows of 64 and more
    with pytest.raises(ValueError, match="model distill: got a quantised checkpoint of another configuration"):
        Stored.of(folder).check("distill", replace(CONFIG, frame_receptive_field=3))
    assert Stored.of(folder) == stored(KEEP)


def test_shards_are_indexed_and_summed(tmp_path, monkeypatch):
    monkeypatch.setattr(quantised_checkpoint, "SHARD", 50_000)
    folder = written(tmp_path / "quantised") / "distill"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert set(json.loads((folder / INDEX).read_text())["weight_map"].values()) == {file.name for file in shards}
    assert len((folder / MANIFEST).read_text().splitlines()) == len(shards)
    assert torch.equal(values(folder.parent)[QKV].scales, quantise(weights_of(random_model(CONFIG))[QKV], 396).scales)
    data = bytearray(shards[1].read_bytes())
    data[-1] ^= 1
    shards[1].write_bytes(data)
    with pytest.raises(ValueError, match=rf"{shards[1].name}: got sha256"):
        values(folder.parent)
    (folder / MANIFEST).unlink()
    shards[1].write_bytes(data[:-5])
    with pytest.raises(ValueError, match=rf"{shards[1].name}: got .*, allowed: a whole safetensors file"):
        Stored.of(folder)


def test_rows_of_zeros_are_weights_too(tmp_path):
    weights = {name: value.detach().clone() for name, value in weights_of(random_model(CONFIG)).items()}
    weights[DOWN][3] = 0
    codes, scales = values(written(tmp_path / "quantised", weights))[DOWN]
    assert not codes[3].view(torch.uint8).any()
    assert float(scales[3]) == pytest.approx(2.0**-100 / 448, rel=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused_and_nothing_is_left(tmp_path, value):
    weights = {name: x.detach().clone() for name, x in weights_of(random_model(CONFIG)).items()}
    weights[DOWN][3, 5] = value
    with pytest.raises(ValueError, match=rf"{DOWN}: got NaN or infinite values"):
        written(tmp_path / "quantised", weights)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(folder, tmp_path):
    before = (folder / "distill" / SINGLE).read_bytes()
    with pytest.raises(ValueError, match=r"output: got .*quantised', which exists, allowed: a new folder"):
        written(folder)
    assert (folder / "distill" / SINGLE).read_bytes() == before
    with pytest.raises(ValueError, match=r"output: got .*, allowed: a folder where one can be made"):
        written(tmp_path / "nowhere" / "quantised")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{}", "allowed: JSON with a version"),
        ("[]", "allowed: JSON with a version"),
        ("{", "allowed: JSON with a version"),
        (json.dumps({"version": VERSION + 1}), f"got version {VERSION + 1} .*allowed: {VERSION}"),
        (json.dumps({"version": VERSION, "keep": []}), "allowed: model, config, scheme, keep"),
        (
            stored(scheme="int4").metadata()[KEY],
            "got scheme 'int4', allowed: fp8, fp8-attention, fp8-tensor",
        ),
        (stored(model="base").metadata()[KEY], "model distill: got a quantised checkpoint of base"),
        (stored(config="0").metadata()[KEY], "model distill: got a quantised checkpoint of another configuration"),
    ],
)
def test_what_is_said_of_another_version_or_model(folder, said, message):
    altered(folder, said={KEY: said})
    with pytest.raises(ValueError, match=message):
        StoredFoal(folder, CPU, torch.bfloat16).weights("distill")


def test_files_that_say_different_things(tmp_path, monkeypatch):
    monkeypatch.setattr(quantised_checkpoint, "SHARD", 100_000)
    folder = written(tmp_path / "quantised") / "distill"
    file = sorted(folder.glob("*.safetensors"))[1]
    save_file(load_file(file), file, stored(KEEP).metadata())
    with pytest.raises(ValueError, match=rf"{file.name}: got another quantisation than model-00001"):
        Stored.of(folder)


BAD = torch.zeros(64, 168).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({DOWN: (BAD.view(torch.uint8) + 127).view(BAD.dtype)}, rf"{DOWN}: got codes that are not numbers"),
        ({DOWN: BAD.float()}, rf"{DOWN}: got codes .*float32, allowed: .*float8_e4m3fn"),
        ({DOWN + SCALE: torch.zeros(64, 1)}, rf"{DOWN}: got scales that are not finite or not above 0"),
        ({DOWN + SCALE: torch.full((64, 1), torch.nan)}, rf"{DOWN}: got scales that are not finite"),
        ({DOWN + SCALE: torch.ones(64)}, rf"{DOWN}: got scales \[64\] torch.float32, allowed: \[64, 1\]"),
        ({DOWN + SCALE: torch.ones(64, 1).half()}, rf"{DOWN}: got scales .*float16"),
        ({"surprise" + SCALE: torch.ones(64, 1)}, "has unexpected surprise_scale"),
        ({"surprise": torch.ones(1)}, "has unexpected surprise"),
    ],
)
def test_tensors_of_another_format(folder, tensors, message):
    altered(folder, tensors=tensors)
    with pytest.raises(ValueError, match=message):
        values(folder)[DOWN]


def test_codes_without_scales_are_no_weights(folder):
    file = folder / "distill" / SINGLE
    save_file({k: v for k, v in load_file(file).items() if k != DOWN + SCALE}, file, stored().metadata())
    (folder / "distill" / MANIFEST).unlink()
    with pytest.raises(ValueError, match=rf"{DOWN}: got torch.float8_e4m3fn, allowed: float32"):
        values(folder)[DOWN]


def test_codes_where_a_plan_wants_the_weight():
    weights, plan = weights_of(random_model(CONFIG)), plan_of("fp8-weights", KEEP)
    pair = quantise(weights[DOWN], 64)
    with pytest.raises(ValueError, match=rf"{DOWN}: got codes of eight bits, allowed: .* as it was"):
        Executor(plan, {**weights, DOWN: pair})
    odd = Quantised(pair.codes[:3], pair.scales)
    with pytest.raises(ValueError, match=rf"{DOWN}: got codes \[3, .*allowed: \[64, "):
        Executor(plan_of("fp8-weights"), {**weights, DOWN: odd})
    with pytest.raises(ValueError, match=rf"{DOWN}: got scales \[1, 1\] .*allowed: \[64, 1\]"):
        Executor(plan_of("fp8-weights"), {**weights, DOWN: quantise(weights[DOWN], 1)})


@pytest.fixture
def small(monkeypatch):
    """The preset with a model of three layers."""
    monkeypatch.setattr("horsepower.runtime.foal.FOAL_MODELS", FOAL_MODELS | {"distill": CONFIG})


def test_an_engine_takes_scheme_and_keep_list_of_its_checkpoint(tmp_path, small):
    source = Foal(CPU, torch.bfloat16)
    folder = written(tmp_path / "quantised", source.weights("distill"), KEEP, scheme="fp8-weights")
    engine = Engine.from_pretrained(folder)
    assert (engine.scheme.name, engine.scheme.keep, engine.dtype) == ("fp8-weights", KEEP, torch.bfloat16)
    assert "untrained" in engine.run(REQUEST).notes[0]
    loading = Engine.from_pretrained("foal", scheme=SCHEMES["fp8-weights"].keeping(KEEP))
    assert torch.equal(engine.run(REQUEST).video, loading.run(REQUEST).video)
    named = Engine.from_pretrained(folder, scheme="fp8-weights")
    assert named.scheme == engine.scheme


def test_what_a_quantised_checkpoint_cannot_do(tmp_path, small):
    folder = written(tmp_path / "quantised")  # of fp8, which this CPU cannot compute
    assert Engine.from_pretrained(folder, scheme="fp8-weights").scheme.name == "fp8-weights"
    own = Scheme("own", "", ("cpu",))
    for given, message in (
        ({}, "scheme: got fp8 for cpu, which cannot compute it, allowed: fp8-weights"),
        ({"mode": "eager"}, "mode: got eager with a checkpoint of fp8, allowed: fused"),
        ({"scheme": "fp8-weights", "dtype": torch.float32}, "scheme: got fp8-weights with torch.float32"),
        ({"scheme": SCHEMES["fp8-weights"].keeping(["*"])}, "scheme: got fp8-weights keeping 1 patterns for a check"),
        (
            {"scheme": own},
            "scheme: got own for a checkpoint of fp8 that keeps 0 layers, allowed: fp8, fp8-attention, fp8-weights",
        ),
        ({"model": "base", "scheme": "fp8-weights"}, "model: got 'base', allowed: distill"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine.from_pretrained(folder, **given)
    Path(folder / "distill").rename(folder / "base")
    with pytest.raises(ValueError, match="model base: got a quantised checkpoint of distill"):
        Engine.from_pretrained(folder)


def test_scales_of_whole_layers_and_what_they_were_calibrated_to(tmp_path):
    folder = written(tmp_path / "quantised", keep=KEEP, scheme="fp8-tensor", largest=FROZEN.largest)
    tensors = load_file(folder / "distill" / SINGLE)
    shapes = {name.removesuffix(SCALE): list(x.shape) for name, x in tensors.items() if name.endswith(SCALE)}
    assert shapes == {f"{layer}.weight": [1 if ".1." in layer else 3, 1] for layer, _ in FROZEN.largest}
    source = StoredFoal(folder, CPU, torch.bfloat16)
    own = source.stored("distill").scheme_for(None)
    assert own == FROZEN.keeping(KEEP)
    assert source.stored("distill").scheme_for(FP8_TENSOR) == source.stored("distill").scheme_for(own) == own
    for given, message in (
        ({}, "scheme: got fp8-tensor for cpu, which cannot compute it, allowed: fp8-weights"),
        (
            {"scheme": "fp8-weights"},
            "got fp8-weights for a checkpoint of fp8-tensor that .* allowed: fp8-tensor, as it",
        ),
        ({"scheme": FP8_TENSOR.calibrated({"a": 1.0})}, "got fp8-tensor with other largest inputs for a checkpoint of"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine.from_pretrained(folder, **given)
    with pytest.raises(
        ValueError, match="scheme: got fp8-tensor for a checkpoint of fp8 .* allowed: fp8, fp8-attention, fp8-weights,"
    ):
        stored().scheme_for(FP8_TENSOR)
    altered(folder, tensors={QKV + SCALE: torch.ones(396, 1)}, said=source.stored("distill").metadata())
    with pytest.raises(ValueError, match=rf"{QKV}: got scales \[396, 1\] .*allowed: \[3, 1\]"):
        values(folder)[QKV]


@pytest.mark.parametrize(
    ("largest", "message"),
    [
        ((), "got fp8-tensor without largest inputs, allowed: calibrated"),
        (FROZEN.largest[:-1], "got block.* without its largest input, allowed: with it"),
        ((*FROZEN.largest, ("a", float("nan"))), "largest: got nan for a, allowed: a number"),
        ((*FROZEN.largest, ("a", "3")), "largest: got '3' for a, allowed: a number"),
    ],
)
def test_a_checkpoint_that_does_not_say_what_it_was_calibrated_to(tmp_path, largest, message):
    folder = written(tmp_path / "quantised", keep=KEEP, scheme="fp8-tensor", largest=largest)
    with pytest.raises(ValueError, match=f"^checkpoint .*{message}"):
        values(folder)
