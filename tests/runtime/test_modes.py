"""Which mode an engine takes where, on GPUs that are played by the CPU."""

import pytest
import torch

from horsepower import Engine, Request
from horsepower.bench import step
from horsepower.bench.step import Tokens
from horsepower.runtime import asked, compiled, engine, memory
from horsepower.runtime.foal import Foal
from horsepower.runtime.fused import FusedDiT, conditioner, velocity_sizes
from horsepower.runtime.presets import FOAL
from horsepower.runtime.tokens import Grid

LONG = Tokens(600, 30, 640)
REQUEST = Request(prompt="a horse", duration=0.2, resolution=(64, 32), num_inference_steps=1)


def refuse(device):
    raise ValueError(f"device: got {device} of capability 7.5, allowed: 8.0 or newer")


def test_a_gpu_without_kernels_runs_eager_and_says_so(monkeypatch):
    monkeypatch.setattr(asked, "target_of", refuse)
    old = Engine.from_pretrained("foal")
    assert old.mode == "eager"
    note = "mode: eager, as there are no fused kernels; device: got cpu of capability 7.5, allowed: 8.0 or newer"
    assert note in old.run(REQUEST).notes
    eager = Engine.from_pretrained("foal", mode="eager")
    assert not [each for each in eager.run(REQUEST).notes if each.startswith("mode:")]
    with pytest.raises(ValueError, match="mode: got 'fused', allowed: eager on cpu; device: got cpu of capability 7.5"):
        Engine.from_pretrained("foal", mode="fused")


def test_a_gpu_with_kernels_runs_its_own_plan(monkeypatch):
    for module in (asked, compiled):
        monkeypatch.setattr(module, "target_of", lambda device: "sm_90")
    gpu = Engine.from_pretrained("foal")
    model, dit = gpu._planned("distill")[0], gpu._parts["distill"]
    assert (gpu.mode, dit.compiled.plan.target) == ("fused", "sm_90")
    assert isinstance(dit, FusedDiT)
    assert all(x.is_meta for x in model.state_dict().values())  # it has no weights of its own
    parts = dit.condition.__self__.state_dict()
    there = {name for name, x in parts.items() if not x.is_meta}
    assert there == {f"adapter.{name}" for name in ("text_embedder.weight", "text_embedder.bias", "rope.bands")}


def test_memory_is_what_the_plan_states(monkeypatch):
    for module in (asked, compiled):
        monkeypatch.setattr(module, "target_of", lambda device: "sm_90")
    gpu = Engine.from_pretrained("foal")
    plan, grid = gpu._planned("540p_sr")[1], Grid.of(896, 512, 126)
    layout = plan.at(velocity_sizes((grid.video, grid.audio, 640), grid.frames))
    request = Request(prompt="a horse", resolution="540p")
    turn = next(each for each in gpu.memory(request).turns if each.phase == "super-resolution")
    assert "540p_sr" not in gpu._parts.there  # nothing of it is there for that
    copied = 3 * memory.latent_bytes(grid) + memory.condition_bytes(FOAL, grid)
    assert turn.device["540p_sr arena"] - copied == layout.arena > 10**7
    assert turn.activations["540p_sr"] == layout.peak - layout.arena + memory.stage_bytes(FOAL, grid, "unipc", 1)
    dit = gpu._dit("540p_sr")
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(dit)}
    assert turn.device["540p_sr"] == sum(held.values())


def tensors_of(dit):
    """Those that a model's steps read, and its condition."""
    condition = [x for x in dit.condition.__self__.state_dict().values() if not x.is_meta]
    return [*condition, *(x for x in dit.compiled._run._fixed.values() if isinstance(x, torch.Tensor))]


def test_on_a_cpu_what_operators_take_is_in_it():
    """Weights are those of the plan; the arena and what is beside it are no more than eager takes."""
    cpu, grid = Engine.from_pretrained("foal"), Grid.of(448, 256, 126)
    size, dit = cpu._dit_bytes("distill", grid, 1), cpu._parts["distill"]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(dit)}
    assert size.weights == sum(held.values())
    layout = dit.compiled.plan.at(velocity_sizes((grid.video, grid.audio, 640), grid.frames))
    assert size.arena == layout.arena < size.arena + size.beside == memory.activation_bytes(FOAL, grid)


def test_an_arena_of_a_larger_clip_counts():
    gpu = Engine.from_pretrained("foal")
    small = Grid.of(64, 32, 10)
    before = gpu._dit_bytes("distill", small, 1)
    held = gpu._parts["distill"].compiled
    with torch.no_grad():
        held(*step.inputs(conditioner(gpu._planned("distill")[0], gpu._source.weights("distill"), "cpu"), LONG))
    assert before.arena < held.arena_bytes == gpu._dit_bytes("distill", small, 1).arena


def test_what_is_missing_is_said_to_the_byte(monkeypatch):
    gpu = Engine.from_pretrained("foal")
    needed = gpu.memory(REQUEST).least
    monkeypatch.setattr(gpu, "_device_memory", needed)
    assert gpu.memory(REQUEST).peak <= needed
    monkeypatch.setattr(gpu, "_device_memory", needed - 1)
    with pytest.raises(ValueError, match="needs about .* GiB in base, allowed: .* are missing"):
        gpu.memory(REQUEST)


@pytest.mark.parametrize("mode", ["fused", "eager"])
def test_weights_that_do_not_fit_are_refused_before_they_are_read(monkeypatch, mode):
    def read(self, name):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(Foal, "weights", read)
    monkeypatch.setattr(engine.memory, "free_bytes", lambda device: 2**20)
    missing = r"^model distill: got 0\.1 GiB of weights, allowed: what fits 0\.0 GiB of cpu; 0\.1 GiB are missing$"
    with pytest.raises(ValueError, match=missing):
        Engine.from_pretrained("foal", mode=mode)


def test_numbers_of_gpus_are_those_of_their_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine.checked_device("cuda") == engine.checked_device(None) == torch.device("cuda", 1)
    assert engine.checked_device("cuda:0") == torch.device("cuda", 0)
    assert engine.checked_device("cpu") == torch.device("cpu")
