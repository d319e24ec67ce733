"""Where a whole clip spends its time: a request through `Engine.run`, by phase, and each step by entry of its plan."""

import shlex
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from horsepower.bench.measure import machine
from horsepower.bench.plot import Bar, bars
from horsepower.bench.profile import check_once
from horsepower.bench.profile_report import (
    RATES,
    check_trace,
    commands,
    entry_figures,
    entry_tables,
    gpu_part,
    inside,
    slowest,
)
from horsepower.bench.ranges import STEP, Place, Profile, finish, gather, marked, places, ranged, total, traced
from horsepower.bench.report import Cell, Figure, Paragraph, Part, Report, Table
from horsepower.bench.telemetry import Telemetry
from horsepower.graph.plan import Plan
from horsepower.runtime.engine import Engine
from horsepower.runtime.fused import FusedDiT
from horsepower.runtime.models.dit import Condition, DiT
from horsepower.runtime.phases import DENOISING
from horsepower.runtime.presets import ModelName
from horsepower.runtime.request import Progress, Request, Result

CLIP, MUX = "clip", "mux"


@dataclass(frozen=True)
class ClipOptions:
    """What is profiled. Raises ValueError for what cannot be."""

    prompt: str
    folder: str = "foal"
    variant: str = "distill"
    device: str = "cpu"
    resolution: str | tuple[int, int] = "256p"
    duration: float = 5  # seconds
    steps: int | None = None  # of the base stage
    scheme: str | None = None
    trace: str | None = None  # file to write, as chrome://tracing and ui.perfetto.dev read it

    def __post_init__(self) -> None:
        check_trace(self.trace)
        _ = self.request  # refuses what makes no clip

    @property
    def request(self) -> Request:
        return Request(
            prompt=self.prompt, resolution=self.resolution, duration=self.duration, num_inference_steps=self.steps
        )

    @property
    def size(self) -> str:
        return self.resolution if isinstance(self.resolution, str) else "x".join(map(str, self.resolution))

    @property
    def command(self) -> str:
        """That makes the one clip for NVIDIA's profilers."""
        words = ["--resolution", self.size, "--duration", f"{self.duration:g}", "--variant", self.variant]
        for name, value in (("steps", self.steps), ("scheme", self.scheme), ("model", self.folder)):
            if value not in (None, "foal"):
                words += [f"--{name}", str(value)]
        return shlex.join(["horsepower", "profile", self.prompt, "--once", *words])


class Ranges:
    """Phases and steps of one request as ranges, by the progress that it reports; and at which sizes its plans ran."""

    def __init__(self, device: torch.device):
        self.steps: dict[str, int] = {}  # of each phase, in order
        self._device, self._phase, self._step = device, ExitStack(), ExitStack()
        self._ran: dict[str, dict[tuple[int, ...], tuple[Plan, tuple[Any, ...]]]] = {}  # by phase and sizes
        self._runs: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __call__(self, progress: Progress) -> None:
        """Before the first and after every step of a phase."""
        self._step.close()
        if progress.step == 0:
            self.steps[progress.stage] = progress.steps
            self._phase = marked(range_of(progress.stage), self._nvtx)
        if progress.step == progress.steps:
            finish(self._device)  # its kernels are its own
            self._phase.close()
        elif progress.stage in DENOISING:
            self._step = marked(STEP, self._nvtx)

    def ran(self, plan: Plan, inputs: tuple[Tensor, Tensor, Condition, int]) -> None:
        """A plan ran in the phase that came last."""
        video, audio, condition, frames = inputs
        phase, sizes = next(reversed(self.steps)), (len(video), len(audio), len(condition.text), frames)
        self._ran.setdefault(phase, {})[sizes] = plan, inputs
        self._runs[phase, sizes] += 1

    def known(self, phase: str) -> dict[str, Place]:
        """What lies behind the names of entries in a phase; under guidance a step runs its plan at two lengths."""
        found: dict[str, Place] = {}
        for sizes, ran in self._ran.get(phase, {}).items():
            for name, place in places(*ran).items():
                a_step = [place.work] * (self._runs[phase, sizes] // self.steps[phase])
                before = [found[name].work] if name in found else []
                found[name] = replace(place, work=total(before + a_step))
        return found

    @property
    def _nvtx(self) -> bool:
        return self._device.type == "cuda"


def range_of(phase: str) -> str:
    """The name of a phase's range."""
    return f"phase {phase}"


class RangedEngine(Engine):
    """An engine whose plans run in ranges as soon as `ranges` is there; without, as they always do."""

    ranges: Ranges | None = None

    def _dit(self, name: ModelName) -> DiT | FusedDiT:
        model = super()._dit(name)
        return RangedDiT(model, self) if isinstance(model, FusedDiT) else model


class RangedDiT(FusedDiT):
    """A compiled model that asks its engine whether to run in ranges."""

    def __init__(self, model: FusedDiT, engine: RangedEngine):
        vars(self).update(vars(model))
        self._engine, self._plain = engine, True

    def velocity(self, video: Tensor, audio: Tensor, condition: Condition, frames: int) -> tuple[Tensor, Tensor]:
        """As `FusedDiT.velocity`."""
        if (ranges := self._engine.ranges) is not None:
            if self._plain:
                self.compiled.drop_arenas()  # two would not fit where memory was stated for one
                self.compiled, self._plain = self.compiled.watched(ranged(video.is_cuda)), False
            ranges.ran(self.compiled.plan, (video, audio, condition, frames))
        return super().velocity(video, audio, condition, frames)


@dataclass(frozen=True)
class ClipProfile:
    """A clip with and without ranges, by phase."""

    plain: dict[str, float]  # seconds of each phase without ranges; muxing is one
    whole: float  # all of that clip
    ranged: dict[str, float]  # the same with ranges and profiler
    ranged_whole: float
    steps: dict[str, int]
    entries: dict[str, Profile]  # of the phases that run a plan
    peak_memory: int  # bytes, as `Timings` has them


def profile_clip(options: ClipOptions) -> Report:
    """Make the clip with and without ranges, each after one to warm up; write the trace, and say where time went."""
    engine = _opened(options)
    _made(engine, options)
    telemetry = Telemetry(engine.device)
    with telemetry:
        start = time.perf_counter()
        result, mux = _made(engine, options)
        whole = time.perf_counter() - start
    plain = {**result.timings.stages, MUX: mux}
    engine.ranges = Ranges(engine.device)
    _made(engine, options)
    engine.ranges = ranges = Ranges(engine.device)
    events = traced(lambda: _made(engine, options), engine.device, options.trace)
    found = _gathered(events, ranges, plain, whole, result.timings.peak_memory, engine.device.type == "cuda")
    return report(found, options, engine, telemetry)


def run_clip_once(options: ClipOptions) -> str:
    """Exactly one clip between cudaProfilerStart and cudaProfilerStop, for nsys and ncu. Raises ValueError."""
    check_once(options.device)
    engine = _opened(options)
    engine.ranges = Ranges(engine.device)
    _made(engine, options)
    engine.ranges = Ranges(engine.device)
    with torch.cuda.profiler.profile():
        _made(engine, options)
    return "one clip was made between cudaProfilerStart and cudaProfilerStop, in NVTX ranges of its phases and entries"


def _opened(options: ClipOptions) -> RangedEngine:
    where = (options.folder, options.variant, options.device)
    engine = RangedEngine.from_pretrained(*where, scheme=options.scheme)
    assert isinstance(engine, RangedEngine)
    return engine


def _made(engine: RangedEngine, options: ClipOptions) -> tuple[Result, float]:
    """The clip, and the seconds that it takes to write it to a file."""
    nvtx, ranges = engine.device.type == "cuda", engine.ranges
    with tempfile.TemporaryDirectory() as folder, ExitStack() as around:
        if ranges is not None:
            around.enter_context(marked(CLIP, nvtx))
        result = engine.run(options.request, ranges)
        if ranges is not None:
            around.enter_context(marked(range_of(MUX), nvtx))
        start = time.perf_counter()
        result.save(Path(folder, "clip.mp4"))
        return result, time.perf_counter() - start


def _gathered(
    events: Sequence[FunctionEvent],
    ranges: Ranges,
    plain: dict[str, float],
    whole: float,
    peak_memory: int,
    on_gpu: bool,
) -> ClipProfile:
    own = [each for each in events if each.device_type == DeviceType.CPU]  # ranges show on the GPU too

    def event(name: str) -> FunctionEvent:
        return next(each for each in own if each.name == name)

    def seconds(name: str) -> float:
        return 1e-6 * float(event(name).cpu_time_total)

    entries = {}
    for phase in ranges.steps:
        if known := ranges.known(phase):
            time_range = event(range_of(phase)).time_range
            mine = (e for e in own if time_range.start <= e.time_range.start <= time_range.end)
            entries[phase] = gather(mine, known, on_gpu)
    steps = {**ranges.steps, MUX: 1}
    timed = {phase: seconds(range_of(phase)) for phase in steps}
    return ClipProfile(plain, whole, timed, seconds(CLIP), steps, entries, peak_memory)


def report(found: ClipProfile, options: ClipOptions, engine: Engine, telemetry: Telemetry) -> Report:
    """As one report: phases, then the entries of each phase that runs a plan."""
    device, on_gpu = str(engine.device), engine.device.type == "cuda"
    says = [
        f"The clip takes {found.whole:.3f} s, {found.ranged_whole:.3f} s with ranges and the profiler on. "
        f"Peak memory {found.peak_memory / 2**30:.2f} GiB.",
        *(
            f"A step of {phase}: {1e3 * sum(each.steps) / len(each.steps):.2f} ms with ranges, of which the plan's "
            f"entries are {1e3 * inside(each):.2f} ms ({'GPU time of their kernels' if on_gpu else 'CPU time'})."
            for phase, each in found.entries.items()
        ),
        RATES if found.entries else f"No entries: models run in mode {engine.mode}, without a plan.",
    ]
    parts: list[Part] = [Paragraph("\n".join(says)), _phases(found)]
    if options.trace is not None:
        parts.insert(1, Paragraph(f"{options.trace}: the clip; ui.perfetto.dev shows it."))
    for phase, each in found.entries.items():
        parts += entry_tables(each, phase)
    longest = max(found.entries.values(), key=lambda each: sum(each.steps), default=None)
    entry = None if longest is None else slowest(longest).name
    lines = commands("clip", options.command, entry, on_gpu)
    parts += [gpu_part(telemetry), Paragraph("\n".join(lines)), _figure(found)]
    for phase, each in found.entries.items():
        parts += entry_figures(each, phase)
    kind = ", ".join((f"{options.folder} {engine.model}", *([options.scheme] if options.scheme else [])))
    title = f"{kind}: profile of a clip of {options.duration:g} s at {options.size}"
    return Report(title, machine(device), tuple(parts))


def _phases(found: ClipProfile) -> Table:
    """And what lies between them: loading of parts, conditions of the models."""
    rest, ranged_rest = (
        whole - sum(each.values()) for whole, each in ((found.whole, found.plain), (found.ranged_whole, found.ranged))
    )
    rows: list[tuple[Cell, ...]] = [
        (phase, found.steps[phase], seconds, 100 * seconds / found.whole, found.ranged[phase])
        for phase, seconds in found.plain.items()
    ]
    rows.append(("(between them)", None, rest, 100 * rest / found.whole, ranged_rest))
    return Table("Phases", ("phase", "steps", "seconds", "% of the clip", "seconds with ranges"), tuple(rows))


def _figure(found: ClipProfile) -> Figure:
    title = "Seconds of each phase"
    return Figure(title, bars(title, [Bar(name, each, each, each) for name, each in found.plain.items()], mark=0.0))
