"""Which mode an engine takes where, on GPUs that are played by the CPU."""

import pytest
import torch

from horsepower import Engine, Request
from horsepower.runtime import compiled, engine
from horsepower.runtime.fused import FusedDiT

REQUEST = Request(prompt="a horse", duration=0.2, resolution=(64, 32), num_inference_steps=1)


def refuse(device):
    raise ValueError(f"device: got {device} of capability 7.5, allowed: 8.0 or newer")


def test_a_gpu_without_kernels_runs_eager_and_says_so(monkeypatch):
    monkeypatch.setattr(engine, "target_of", refuse)
    old = Engine.from_pretrained("foal")
    assert old.mode == "eager"
    note = "mode: eager, as there are no fused kernels; device: got cpu of capability 7.5, allowed: 8.0 or newer"
    assert note in old.run(REQUEST).notes
    asked = Engine.from_pretrained("foal", mode="eager")
    assert not [each for each in asked.run(REQUEST).notes if each.startswith("mode:")]
    with pytest.raises(ValueError, match="mode: got 'fused', allowed: eager on cpu; device: got cpu of capability 7.5"):
        Engine.from_pretrained("foal", mode="fused")


def test_a_gpu_with_kernels_runs_its_own_plan(monkeypatch):
    for module in (engine, compiled):
        monkeypatch.setattr(module, "target_of", lambda device: "sm_90")
    gpu = Engine.from_pretrained("foal")
    model, dit = gpu._planned("distill")[0], gpu._dit("distill")
    assert (gpu.mode, dit.compiled.plan.target) == ("fused", "sm_90")
    assert isinstance(dit, FusedDiT)
    assert all(x.is_meta for x in model.state_dict().values())  # it has no weights of its own
    parts = dit.condition.__self__.state_dict()
    there = {name for name, x in parts.items() if not x.is_meta}
    assert there == {f"adapter.{name}" for name in ("text_embedder.weight", "text_embedder.bias", "rope.bands")}


def test_numbers_of_gpus_are_those_of_their_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine._device("cuda") == engine._device(None) == torch.device("cuda", 1)
    assert engine._device("cuda:0") == torch.device("cuda", 0)
    assert engine._device("cpu") == torch.device("cpu")
