"""Profiles: nothing of a step is lost or counted twice, and what a GPU would say is read right."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.profiler import record_function

from horsepower.bench import profile
from horsepower.bench.profile import Options
from horsepower.bench.profile_report import commands
from horsepower.bench.ranges import STEP, Place, block_of, gather, kind_of, places, range_name, ranged, traced
from horsepower.bench.step import Tokens
from horsepower.bench.telemetry import QUANTITIES, Telemetry
from horsepower.kernels.registry import Cost
from models import TINY, random_model


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("block.layers.3.attention.core", "block.layers.3"),
        ("block.layers.11", "block.layers.11"),
        ("adapter.video_embedder", "adapter.video_embedder"),
        ("", "(model)"),
    ],
)
def test_blocks(module, block):
    assert block_of(module) == block


def test_every_entry_is_counted_once_and_times_add_up():
    model = random_model(TINY)
    with torch.no_grad():
        compiled = profile.compile_velocity(model, cache=False)
    inputs = profile.step.inputs(model, Tokens(12, 5, 3, 3))
    ran, mark = [], ranged(False)

    def around(call, step):
        inner = mark(call, step)
        return lambda env: (ran.append(call), inner(env))

    watched = compiled.watched(around)
    watched(*inputs)
    ran.clear()

    def steps():
        for _ in range(3):
            with record_function(STEP):
                watched(*inputs)

    found = gather(traced(steps, torch.device("cpu"), None), places(compiled.plan, inputs), on_gpu=False)
    assert sum(entry.calls for entry in found.entries) * 3 == len(ran)
    assert {entry.name for entry in found.entries} == {range_name(call) for call in ran}
    attention = [entry for entry in found.entries if entry.place.kind == "attention"]
    assert [entry.place.block for entry in attention] == [f"block.layers.{n}" for n in range(TINY.num_layers)]
    assert {entry.place.work.flops for entry in attention} == {4 * 20 * 20 * TINY.num_heads_q * TINY.head_dim}
    assert all(entry.place.work.bytes for entry in found.entries)
    for i in range(3):
        assert found.outside[i] + sum(entry.seconds[i] for entry in found.entries) == pytest.approx(found.steps[i])
        assert found.outside[i] > 0


def event(name, start, cpu, device, kind=DeviceType.CPU):
    begin = SimpleNamespace(start=start)
    return SimpleNamespace(name=name, cpu_time_total=cpu, device_time_total=device, device_type=kind, time_range=begin)


def test_on_a_gpu_the_time_of_kernels_counts_and_their_own_ranges_do_not():
    events = [
        event(STEP, 0, 100, 80), event("a x", 1, 5, 30), event("a x", 10, 5, 20),
        event("a x", 12, 0, 99, DeviceType.CUDA),
        event(STEP, 200, 110, 70), event("a x", 201, 5, 40), event("a x", 220, 5, 25), event("aten::mm", 221, 3, 25),
    ]  # fmt: skip
    place = Place("x", "a", Cost(6, 4))
    found = gather(events, {"a x": place, "b y": Place("y", "b", Cost(1, 1))}, on_gpu=True)
    (entry,) = found.entries
    assert (entry.place, entry.calls) == (place, 2)
    assert entry.seconds == pytest.approx((50e-6, 65e-6))
    assert found.outside == pytest.approx((30e-6, 5e-6))
    assert found.steps == pytest.approx((100e-6, 110e-6))


def test_kinds_are_short():
    for target, kind in (("horsepower.attention.default", "attention"), ("aten.to.dtype", "aten.to.dtype")):
        assert kind_of(SimpleNamespace(target=target)) == kind


def test_once_is_one_step_between_start_and_stop(monkeypatch):
    happened = []

    @contextmanager
    def recording():
        happened.append("start")
        yield
        happened.append("stop")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.profiler, "profile", recording)
    monkeypatch.setattr(profile, "_prepared", lambda _: (None, lambda x: happened.append("step"), (torch.zeros(1),)))
    profile.run_once(Options(Tokens(12, 5, 3), device="cuda"))
    assert happened[-3:] == ["start", "step", "stop"]
    assert set(happened[:-3]) == {"step"}  # warmed up before


def test_the_commands_run_one_step_of_the_same():
    options = Options(Tokens(12, 5, 3, 3), "base", "cuda")
    text = "\n".join(commands("step", options.command, "block.layers.0.mlp linear", on_gpu=True))
    assert text.count("horsepower profile --once --variant base --tokens 12,5,3 --frames 3") == 2
    assert "--nvtx-include 'block.layers.0.mlp linear/'" in text


class Nvml(SimpleNamespace):
    """As much of pynvml as is used; the temperature is not told."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, broken=False):
        super().__init__(broken=broken, open=0, watts=[])

    def nvmlInit(self):  # noqa: N802
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetPowerUsage(self, handle):  # noqa: N802
        assert handle == "handle"
        self.watts.append(100_000 + 1000 * len(self.watts))
        return self.watts[-1]

    def nvmlDeviceGetClockInfo(self, handle, which):  # noqa: N802
        return {1: 1980, 2: 2619}[which]

    def nvmlDeviceGetTemperature(self, handle, which):  # noqa: N802
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(used=3 * 2**20)


def test_telemetry(monkeypatch):
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    with Telemetry(torch.device("cuda"), period=0.001) as telemetry:
        while len(nvml.watts) < 3:
            pass
    rows = {name: values for name, *values in telemetry.rows()}
    watts = [each / 1000 for each in nvml.watts]
    assert rows["power, W"] == pytest.approx([watts[0], sum(watts) / len(watts), watts[-1]])
    assert rows["SM clock, MHz"] == [1980, 1980, 1980]
    assert rows["memory in use, MiB"] == [3, 3, 3]
    assert set(QUANTITIES) - set(rows) == {"temperature, C"}
    assert (telemetry.missing, nvml.open) == ("", 0)


@pytest.mark.parametrize(
    ("nvml", "device", "reason"),
    [(None, "cuda", "not installed"), (Nvml(broken=True), "cuda", "Driver Not Loaded"), (Nvml(), "cpu", "on the CPU")],
)
def test_without_telemetry_it_says_why(monkeypatch, nvml, device, reason):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Telemetry(torch.device(device)) as telemetry:
        pass
    assert reason in telemetry.missing
    assert telemetry.rows() == []
    assert nvml is None or nvml.open == 0
