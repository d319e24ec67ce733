"""The ladder at full size: a step of a model of the released sizes on a GPU, with random weights, rung by rung.

Not all rungs have their weights in memory at one time. In each round the rungs take turns; a rung whose weights had to
go makes them anew and warms up before it is timed.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from horsepower.bench import step
from horsepower.bench.ladder import (
    LABELS,
    RECIPES,
    Rung,
    Velocity,
    best_rival,
    climbed,
    compile_cold,
    first_line,
    flat,
    speedup,
)
from horsepower.bench.live import allocated_peak
from horsepower.bench.measure import machine, seconds_of, turn
from horsepower.bench.plot import Bar, bars
from horsepower.bench.report import Cell, Figure, Paragraph, Part, Report, Table
from horsepower.bench.seats import Modules, Planned, Pool, Seat, TransformerEngine
from horsepower.bench.step import RandomWeights, Tokens
from horsepower.graph.passes import Pass
from horsepower.kernels.target import target_of
from horsepower.quant.scheme import Scheme
from horsepower.runtime import memory
from horsepower.runtime.calibration import calibrated, largest_inputs
from horsepower.runtime.checkpoint import fill
from horsepower.runtime.devices import free_bytes
from horsepower.runtime.executor import weights_of
from horsepower.runtime.fused import conditioner, plan_velocity
from horsepower.runtime.models.dit import Condition, DiT

Say = Callable[[str], None]

SAMPLE = 2048  # tokens at which errors are found: float64 takes some seconds
SPARE = 2**30  # bytes for what libraries take beside tensors
WARMUP = 2  # after the first run: a plan's second is captured, from its third on it is replayed


@dataclass(frozen=True)
class Options:
    """What is measured. Raises ValueError for what cannot be."""

    tokens: Tokens
    rounds: int = 5
    skip: tuple[str, ...] = ()  # keys of LABELS

    def __post_init__(self) -> None:
        if self.rounds < 3:
            raise ValueError(f"rounds: got {self.rounds}, allowed: at least 3")
        allowed = [name for name in LABELS if name not in ("eager", "whole")]
        if wrong := [name for name in self.skip if name not in (*allowed, "whole")]:
            raise ValueError(f"skip: got {wrong[0]!r}, allowed: {', '.join(allowed)}")


@dataclass
class Way:
    """One way to run the step."""

    key: str
    seat: Seat
    run: Velocity
    beside: int  # bytes that a run takes beside its seat
    planning: float | None = None  # seconds
    rung: Rung = field(init=False)
    seconds: list[float] = field(default_factory=list)
    warm: bool = False

    def __post_init__(self) -> None:
        self.rung = Rung(self.key)


def climb(model: DiT, options: Options, device: torch.device, title: str, say: Say = lambda _: None) -> Report:
    """Measure every rung; `model` is on the meta device. `say` gets a line now and then: it takes minutes."""
    return report(title, options, measure(model, options, device, say), machine(str(device)))


@torch.no_grad()
def measure(
    model: DiT, options: Options, device: torch.device, say: Say = lambda _: None, capacity: int | None = None
) -> list[Rung]:
    """The rungs at the options' tokens. capacity: bytes to do with; None takes what the device has free."""
    weights = RandomWeights(model, device)
    part = conditioner(model, weights, device)
    inputs, sample = (step.inputs(part, each) for each in (options.tokens, options.tokens.scaled(SAMPLE)))
    say("computing a sample in float64")
    velocity, largest = exact_velocity(model, weights, sample)
    exact = flat(velocity)
    ways = _ways(model, weights, inputs, largest, options, device, say)
    pool = Pool(free_bytes(device) - SPARE if capacity is None else capacity)
    for i in range(options.rounds):
        say(f"round {i + 1} of {options.rounds}")
        for way in turn(ways, i):
            if way.rung.failed:
                continue
            try:
                if pool.take(way.seat, way.beside):
                    for each in ways:
                        each.warm = each.warm and each.seat is not way.seat
                _turn(way, inputs, sample, exact, partial(_peak, device=device, seat=way.seat, pool=pool))
            except Exception as error:  # memory that is not there, a compiler that fails: the row says so
                way.rung = replace(way.rung, failed=_said(error))
            if way.rung.failed:
                pool.clear()  # out here, where the error holds no tensors
    return [way.rung if way.rung.failed else replace(way.rung, seconds=tuple(way.seconds)) for way in ways]


def _ways(
    model: DiT,
    weights: Mapping[str, Tensor],
    inputs: tuple[Any, ...],
    largest: Mapping[str, Tensor],
    options: Options,
    device: torch.device,
    say: Say,
) -> list[Way]:
    """All rungs, nothing loaded yet; the plans are made. What cannot be made says so, and the others go on."""
    modules, target = Modules(model, weights, device), target_of(device)
    beside = memory.activation_bytes(model.config, options.tokens.grid, options.tokens.text)
    ways = [Way("eager", modules, modules.eager.velocity, beside)]
    if "regional" not in options.skip:
        ways.append(Way("regional", modules, modules.regional.velocity, beside))

    def engine(scheme: Scheme) -> Way:
        seat = TransformerEngine(model, weights, device, scheme, inputs)
        return Way(scheme.name, seat, seat.velocity, beside)

    def planned(key: str, passes: tuple[Pass, ...], scheme: Scheme | None) -> Way:
        say(f"planning {LABELS[key]}")
        chosen = calibrated(scheme, largest) if scheme is not None and scheme.inputs == "tensor" else scheme
        start = time.perf_counter()
        plan = plan_velocity(model, device, False, passes, cache=False, scheme=chosen)
        seat, seconds = Planned(plan, weights, options.tokens), time.perf_counter() - start
        return Way(key, seat, seat.velocity, 0, seconds)

    recipes = [scheme for scheme in RECIPES if target in scheme.targets and scheme.name not in options.skip]
    makes = {scheme.name: partial(engine, scheme) for scheme in recipes}
    makes |= {each[0]: partial(planned, *each) for each in climbed(options.skip, target)}
    for key, make in makes.items():
        try:
            ways.append(make())
        except Exception as error:  # a package that is not there, a plan that is refused: the row says so
            ways.append(Way(key, modules, modules.eager.velocity, 0))
            ways[-1].rung = Rung(key, failed=_said(error))
    return ways


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _turn(
    way: Way, inputs: tuple[Any, ...], sample: tuple[Any, ...], exact: Tensor, peak: Callable[[Callable[[], Any]], int]
) -> None:
    """Warm up if need be, and time a run; at its first turn find what else there is to say of a rung."""

    def run() -> Any:
        return way.run(*inputs)

    started = bool(way.seconds)
    if not started:
        _start(way, inputs, sample, exact, run)
    if not way.warm:
        for _ in range(1 + WARMUP if started else WARMUP):
            run()
        way.warm = True
    if not started:
        way.rung = replace(way.rung, peak=peak(run))
    way.seconds.append(seconds_of(run))


def _start(
    way: Way, inputs: tuple[Any, ...], sample: tuple[Any, ...], exact: Tensor, run: Callable[[], Any]
) -> None:  # fmt: skip
    if way.key == "regional":  # no error: torch.compile compiles other lengths anew
        _, way.rung = compile_cold(way.key, lambda: way.run, inputs)
        return
    seconds = seconds_of(run)
    if way.planning is not None:
        way.rung = replace(way.rung, compile_seconds=way.planning + seconds)
    got = flat(way.run(*sample)).double()
    way.rung = replace(way.rung, error=float((got - exact).norm() / exact.norm()))


def _peak(run: Callable[[], Any], device: torch.device, seat: Seat, pool: Pool) -> int:
    """Bytes that are allocated at the most, without those of the seats beside."""
    if device.type != "cuda":
        return allocated_peak(run) + seat.bytes
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - pool.beside(seat)


@torch.no_grad()
def exact_velocity(
    model: DiT, weights: Mapping[str, Tensor], inputs: Sequence[Any]
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """`velocity` with the same weights in float64, of which one layer's are there at a time.

    And the largest input of each linear layer, as `largest_inputs`.
    """
    video, audio, condition, frames = inputs
    exact = DiT(replace(model.config, params_dtype=torch.float64), torch.float64, "meta")

    def watch(module: nn.Module, prefix: str) -> None:
        def arrive(*_: Any) -> None:
            values = {name: weights[name].double() for name in (f"{prefix}.{own}" for own in weights_of(module))}
            fill(module, values, video.device, f"{prefix}.")

        def leave(*_: Any) -> None:
            module.to("meta")

        module.register_forward_pre_hook(arrive)
        module.register_forward_hook(leave)

    for name, module in exact.named_modules():
        if name.startswith(("adapter.", "final_")) or module in {*exact.block.layers}:
            watch(module, name)
    wide = Condition(condition.text.double(), condition.rope.double())
    with largest_inputs(exact) as largest:
        return exact.velocity(video.double(), audio.double(), wide, frames), largest


COLUMNS = (
    "rung", "ms", "lower quartile", "upper quartile", "eager / rung", "torch.compile / rung", "compile s", "peak GiB",
    "error", "note",
)  # fmt: skip


def report(title: str, options: Options, rungs: Sequence[Rung], where: str) -> Report:
    """`rungs`: eager first, as `measure` gives them."""
    tokens, sample = options.tokens, options.tokens.scaled(SAMPLE)
    legend = (
        f"Random weights from a fixed seed. Times: medians of {options.rounds} rounds in which the rungs take turns, "
        "each warmed up; plans run as CUDA graphs on a GPU. eager / rung: how many times as fast as eager.\n"
        "compile s: planning and the first run, Triton's compilation in it; of torch.compile from an empty cache. "
        "peak GiB: weights, arena and what a run takes beside them.\n"
        f"error: relative L2 of a step of {sample.total} tokens ({sample}, {sample.frames} frames) against the same "
        "weights in float64, a layer at a time. torch.compile is not compared: another length compiles anew.\n"
        "fp8-tensor: scales of that step; inputs quantised by a kernel of its own. te-delayed: scales of the one that "
        "is timed. te: Transformer Engine."
    )
    rows = tuple(_row(rung, rungs[0], best_rival(rungs)) for rung in rungs)
    ran = [(rung, speedup([rungs[0]], [rung])) for rung in rungs if rung.seconds and rungs[0].seconds]
    drawn = [Bar(LABELS[rung.key], speed.median, speed.low, speed.high) for rung, speed in ran]
    frames = f"{tokens.frames} frame{'s' * (tokens.frames != 1)}"
    what = f"{tokens.total} tokens: {tokens.video} video in {frames}, {tokens.audio} audio, {tokens.text} text"
    parts: list[Part] = [Paragraph(legend), Table(what, COLUMNS, rows)]
    if drawn:
        parts.append(Figure(f"{what}: how many times as fast as eager", bars(f"{what}: eager / rung", drawn)))
    return Report(title, where, tuple(parts))


def _row(rung: Rung, eager: Rung, rival: Rung | None) -> tuple[Cell, ...]:
    label = LABELS[rung.key]
    if rung.failed:
        return (label, *[None] * 8, rung.failed)
    low, middle, high = (1e3 * each for each in statistics.quantiles(rung.seconds, n=4))
    peak = None if rung.peak is None else rung.peak / 2**30
    speeds = [
        speedup([other], [rung]).median if other is not None and other.seconds else None for other in (eager, rival)
    ]
    return (label, middle, low, high, *speeds, rung.compile_seconds, peak, rung.error, "")
