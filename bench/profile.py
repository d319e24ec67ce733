"""Where a denoising step of a preset spends its time, by entry of its plan, and what the GPU did meanwhile."""

import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from horsepower.bench import step
from horsepower.bench.measure import machine, paired
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
from horsepower.bench.ranges import STEP, Profile, finish, gather, marked, places, ranged, traced
from horsepower.bench.report import Paragraph, Part, Report
from horsepower.bench.step import Tokens
from horsepower.bench.telemetry import Telemetry
from horsepower.runtime.fused import compile_velocity

WARMUP = 2  # the first run of a program makes it


@dataclass(frozen=True)
class Options:
    """What is profiled. Raises ValueError for what cannot be."""

    tokens: Tokens
    variant: str = "distill"
    device: str = "cpu"
    rounds: int = 7
    trace: str | None = None  # file to write, as chrome://tracing and ui.perfetto.dev read it

    def __post_init__(self) -> None:
        if self.rounds < 3:
            raise ValueError(f"rounds: got {self.rounds}, allowed: at least 3")
        check_trace(self.trace)

    @property
    def command(self) -> str:
        """That runs the one step for NVIDIA's profilers."""
        tokens = ["--tokens", str(self.tokens), "--frames", str(self.tokens.frames)]
        return shlex.join(["horsepower", "profile", "--once", "--variant", self.variant, *tokens])


def profile(options: Options) -> Report:
    """Run steps with and without ranges, write the trace, and say where the time went."""
    run, watched, inputs = _prepared(options)
    device = inputs[0].device
    telemetry = Telemetry(device)
    with telemetry:
        plain = paired({"step": lambda: run(*inputs)}, options.rounds, WARMUP)["step"]
    for _ in range(WARMUP):
        watched(*inputs)

    def steps() -> None:
        for _ in range(options.rounds):
            with marked(STEP, nvtx=False):
                watched(*inputs)
                finish(device)

    found = gather(traced(steps, device, options.trace), places(watched.plan, inputs), device.type == "cuda")
    return report(found, plain, options, telemetry)


def run_once(options: Options) -> str:
    """Exactly one step between cudaProfilerStart and cudaProfilerStop, for ncu and nsys. Raises ValueError."""
    check_once(options.device)
    _, watched, inputs = _prepared(options)
    for _ in range(WARMUP):
        watched(*inputs)
    finish(inputs[0].device)
    with torch.cuda.profiler.profile():
        watched(*inputs)
        finish(inputs[0].device)
    return "one step ran between cudaProfilerStart and cudaProfilerStop, in NVTX ranges named after the plan's entries"


def check_once(device: str) -> None:
    """Raises ValueError where NVIDIA's profilers see nothing."""
    if not torch.cuda.is_available() or torch.device(device).type != "cuda":
        raise ValueError(f"once: got {device!r}, allowed: a GPU; ncu and nsys profile nothing else")


def _prepared(options: Options) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """The compiled step, its twin with ranges, and inputs."""
    model = step.preset(options.variant, options.device)
    with torch.no_grad():
        compiled = compile_velocity(model)
    inputs = step.inputs(model, options.tokens)
    return compiled, compiled.watched(ranged(inputs[0].is_cuda)), inputs


def report(found: Profile, plain: Sequence[float], options: Options, telemetry: Telemetry) -> Report:
    """As one report. plain: seconds of steps without ranges."""
    on_gpu = torch.device(options.device).type == "cuda"
    timed = "GPU time of their kernels" if on_gpu else "CPU time"
    says = (
        f"A step takes {1e3 * statistics.median(plain):.2f} ms (median of {options.rounds}); "
        f"{1e3 * statistics.median(found.steps):.2f} ms with ranges and the profiler on, of which the plan's entries "
        f"are {1e3 * inside(found):.2f} ms ({timed}).\n{RATES}"
    )
    parts: list[Part] = [Paragraph(says)]
    if options.trace is not None:
        parts.append(Paragraph(f"{options.trace}: all {options.rounds} steps; ui.perfetto.dev shows it."))
    lines = commands("step", options.command, slowest(found).name, on_gpu)
    parts += [*entry_tables(found), gpu_part(telemetry), Paragraph("\n".join(lines)), *entry_figures(found)]
    where = f"{options.tokens} tokens in {options.tokens.frames} frames"
    return Report(f"foal {options.variant}: profile of a step, {where}", machine(options.device), tuple(parts))
