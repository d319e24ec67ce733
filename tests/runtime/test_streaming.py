"""Weights that lie elsewhere than the plan: made when they are asked for, dropped when nobody needs them.

The CPU stands for the GPU: the plans are those of sm_90, with every recipe, and what comes "from elsewhere" is new.
"""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

from horsepower.bench.live import live_peak
from horsepower.graph import stored
from horsepower.runtime import compiled as compiled_module
from horsepower.runtime.checkpoint import fill
from horsepower.runtime.compiled import compile, planned
from horsepower.runtime.executor import Executor, weights_of
from horsepower.runtime.fused import VELOCITY_SHAPES, FusedDiT, plan_velocity, velocity_example
from horsepower.runtime.models.dit import DiT
from models import TINY, random_inputs, random_model

CPU = torch.device("cpu")
CONFIG = replace(TINY, hidden_size=256, head_dim=128)  # heads that are paired, and an MLP that is padded


class Elsewhere(Mapping):
    """Copies of a model's weights, made when they are asked for."""

    def __init__(self, model):
        self.values, self.asked = weights_of(model), []

    def __getitem__(self, name):
        self.asked.append(name)
        return self.values[name].clone()

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)


@pytest.fixture
def sm_90(monkeypatch):
    monkeypatch.setattr(compiled_module, "target_of", lambda device: "sm_90")


@pytest.fixture
def gpu_plan(sm_90):
    return plan_velocity(DiT(CONFIG, device="meta"), CPU)


def test_beside_finished_weights_lies_one(gpu_plan):
    model = random_model(CONFIG)
    recipes = {call.target for call in gpu_plan.loads}
    assert {"horsepower.pair_heads.default", "horsepower.pad_weight.default"} <= recipes
    weights = Elsewhere(model)
    kept = []
    held = live_peak(lambda: kept.append(Executor(gpu_plan, weights)))
    raw = sum(x.nbytes for x in weights.values.values())
    largest = max(x.nbytes for x in weights.values.values())
    assert gpu_plan.weight_bytes <= held <= gpu_plan.load_bytes + 3 * largest  # a recipe's own temporaries
    assert held < 0.75 * (raw + gpu_plan.weight_bytes)
    assert sorted(weights.asked) == sorted(weight.name for weight in gpu_plan.weights)
    assert len(set(weights.asked)) == len(weights.asked)


def test_streamed_weights_give_what_the_module_gives():
    model = random_model(CONFIG, torch.float32)
    meta = DiT(CONFIG, torch.float32, "meta")
    streamed = FusedDiT(meta, plan=plan_velocity(meta, CPU), weights=Elsewhere(model))
    *parts, coords = random_inputs(CONFIG, 3, 4, 5, 6)
    with torch.no_grad():
        condition, own = streamed.condition(parts[2], coords), model.condition(parts[2], coords)
        assert all(torch.equal(a, b) for a, b in zip(condition, own, strict=True))
        got, want = (each.velocity(*parts[:2], own, 3) for each in (streamed, FusedDiT(model)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_plan_from_the_meta_device_is_the_one_from_the_device():
    model = random_model(CONFIG)
    example = velocity_example(model)
    here = planned(model, example, None, VELOCITY_SHAPES, method="velocity", cache=False)[0]
    meta = DiT(CONFIG, device="meta")
    there = planned(meta, velocity_example(meta), None, VELOCITY_SHAPES, method="velocity", cache=False)[0]
    assert {call.device.type for call in (here, there)} == {"cpu", "meta"}
    assert str(there.on(CPU)) == str(here)
    assert stored.dump(there.on(CPU)) == stored.dump(here)


def test_a_plan_moves_as_a_whole():
    meta = DiT(CONFIG, device="meta")
    plan, _ = planned(meta, velocity_example(meta), None, VELOCITY_SHAPES, method="velocity", target="sm_80")
    gpu = torch.device("cuda", 1)
    moved = plan.on(gpu)
    assert "on meta" not in str(moved)
    assert moved.device == gpu
    again = stored.load(stored.dump(moved), moved.contract.spec)
    assert again.device == gpu
    assert str(again) == str(moved)
    sizes = {"video_0": 6, "audio_0": 5, "condition_text_0": 4, "frames": 3}
    assert (moved.at(sizes).peak, moved.weight_bytes) == (plan.at(sizes).peak, plan.weight_bytes)


class Table(nn.Module):
    """A module with a constant, a view of a weight, and a device that it names."""

    def __init__(self, device):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, device=device))

    def forward(self, x):
        return x @ self.weight[:4] + torch.ones(4, device=x.device) + torch.arange(4, device=x.device)


def test_compiled_on_the_meta_device_with_weights_from_elsewhere():
    torch.manual_seed(0)
    module, x = Table("cpu"), torch.randn(3, 4)
    meta = Table("meta")
    run = compile(meta, (x.to("meta"),), device="cpu", weights=weights_of(module))
    with torch.no_grad():
        torch.testing.assert_close(run(x), module(x))
    assert run.plan.weight_bytes >= module.weight.nbytes
    fill(meta, weights_of(module), "cpu")
    with pytest.raises(RuntimeError, match="weight: changed after compiling"):
        run(x)


def test_another_shape_from_elsewhere_is_refused(gpu_plan):
    weights = weights_of(random_model(CONFIG))
    name = "block.layers.1.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=rf"{name}: got \[256, 680\] torch.float32, allowed: \["):
        Executor(gpu_plan, {**weights, name: weights[name].float()})
    with pytest.raises(ValueError, match=r"weights: block\.layers\.1\.mlp\.down_proj\.weight is missing, and 0 more"):
        Executor(gpu_plan, {key: value for key, value in weights.items() if key != name})


def test_stored_plans_stream(gpu_plan):
    plan = stored.load(stored.dump(gpu_plan), gpu_plan.contract.spec)
    model = random_model(CONFIG)
    results = [list(Executor(each, Elsewhere(model))._fixed.values()) for each in (gpu_plan, plan)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
