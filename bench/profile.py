"""Where a denoising step of a preset spends its time, by entry of its plan, and what the GPU did meanwhile."""

import shlex
import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function
from torch.utils import _pytree as pytree

from horsepower.bench import step
from horsepower.bench.measure import machine, paired
from horsepower.bench.plot import Bar, bars
from horsepower.bench.report import Cell, Figure, Paragraph, Part, Report, Table, check_file
from horsepower.bench.step import Tokens
from horsepower.bench.telemetry import Telemetry
from horsepower.graph.call import Call, Ref
from horsepower.graph.explain import cost_of
from horsepower.graph.operators import operator_of
from horsepower.graph.plan import Plan
from horsepower.kernels.registry import Cost
from horsepower.runtime.fused import compile_velocity

STEP = "denoising step"
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
        if self.trace is not None and not self.trace.endswith((".json", ".json.gz")):
            raise ValueError(f"trace: got {self.trace!r}, allowed: a name that ends in .json or .json.gz")
        if self.trace is not None:
            check_file(self.trace)

    @property
    def command(self) -> str:
        """That runs the one step for NVIDIA's profilers."""
        tokens = ["--tokens", str(self.tokens), "--frames", str(self.tokens.frames)]
        return shlex.join(["horsepower", "profile", "--once", "--variant", self.variant, *tokens])


@dataclass(frozen=True)
class Place:
    """What lies behind the name of a range."""

    kind: str  # operator
    block: str  # of the model
    work: Cost  # of a step


@dataclass(frozen=True)
class Entry:
    """An entry of the plan, or several that are told apart no further: seconds in each profiled step."""

    name: str  # as in the trace
    place: Place
    calls: int  # a step
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Profile:
    """Of the steps profiled; seconds are those of the device that the step runs on."""

    entries: tuple[Entry, ...]
    outside: tuple[float, ...]  # in a step and in none of its entries
    steps: tuple[float, ...]  # wall clock, with ranges and profiler
    plain: tuple[float, ...]  # wall clock, without


def profile(options: Options) -> Report:
    """Run steps with and without ranges, write the trace, and say where the time went."""
    run, watched, inputs = _prepared(options)
    device = inputs[0].device
    telemetry = Telemetry(device)
    with telemetry:
        plain = paired({"step": lambda: run(*inputs)}, options.rounds, WARMUP)["step"]
    for _ in range(WARMUP):
        watched(*inputs)
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *cuda]) as trace:
        for _ in range(options.rounds):
            with record_function(STEP):
                watched(*inputs)
                _finish(device)
    if options.trace is not None:
        trace.export_chrome_trace(options.trace)
    events: Sequence[FunctionEvent] = trace.events() or []
    found = gather(events, places(watched.plan, inputs), plain, on_gpu=device.type == "cuda")
    return report(found, options, telemetry)


def run_once(options: Options) -> str:
    """Exactly one step between cudaProfilerStart and cudaProfilerStop, for ncu and nsys. Raises ValueError."""
    if not torch.cuda.is_available() or torch.device(options.device).type != "cuda":
        raise ValueError(f"once: got {options.device!r}, allowed: a GPU; ncu and nsys profile nothing else")
    _, watched, inputs = _prepared(options)
    for _ in range(WARMUP):
        watched(*inputs)
    _finish(inputs[0].device)
    with torch.cuda.profiler.profile():
        watched(*inputs)
        _finish(inputs[0].device)
    return "one step ran between cudaProfilerStart and cudaProfilerStop, in NVTX ranges named after the plan's entries"


def _prepared(options: Options) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """The compiled step, its twin with ranges, and inputs."""
    model = step.preset(options.variant, options.device)
    with torch.no_grad():
        compiled = compile_velocity(model)
    inputs = step.inputs(model, options.tokens)
    return compiled, compiled.watched(ranged(inputs[0].is_cuda)), inputs


def ranged(nvtx: bool) -> Callable[[Call, Callable[[Any], None]], Callable[[Any], None]]:
    """For `Executor.watched`: each call in a range of torch's profiler, and of NVTX too."""

    def around(call: Call, execute: Callable[[Any], None]) -> Callable[[Any], None]:
        name = range_name(call)

        def run(env: Any) -> None:
            with ExitStack() as ranges:
                ranges.enter_context(record_function(name))
                if nvtx:
                    ranges.enter_context(torch.cuda.nvtx.range(name))
                execute(env)

        return run

    return around


def range_name(call: Call) -> str:
    """The module that a call comes from, and its operator: `block.layers.3.attention attention`."""
    return f"{call.module or '(model)'} {kind_of(call)}"


def kind_of(call: Call) -> str:
    """The operator, as short as it is clear: attention, aten.linear."""
    return call.target.removeprefix("horsepower.").removesuffix(".default")


def block_of(module: str) -> str:
    """The repeated block that a module lies in, such as block.layers.3; else the module."""
    path = module.split(".")
    number = next((i for i, part in enumerate(path) if part.isdecimal()), len(path) - 1)
    return ".".join(path[: number + 1]) or "(model)"


def places(plan: Plan, inputs: Sequence[Any]) -> dict[str, Place]:
    """By the names of ranges, at the sizes of `inputs`; found on tensors without memory."""
    env: dict[str, Any] = dict(zip(map(str, plan.inputs), plan.contract.check(tuple(inputs), {})[0], strict=True))
    for weight in plan.weights:
        spec = weight.spec
        env[weight.value] = torch.empty_strided(spec.shape, spec.strides, dtype=spec.dtype, device="meta")
    found: dict[str, Place] = {}
    for i, call in enumerate((*plan.loads, *plan.calls)):
        args, kwargs = (_on_meta(each, env) for each in (call.args, dict(call.kwargs)))
        operator = operator_of(call.target)
        env[call.result] = made = operator(*args, **kwargs)
        if i >= len(plan.loads):
            name = range_name(call)
            own = [cost_of(operator, args, kwargs, made)] if call.makes else []
            before = [found[name].work] if name in found else []
            found[name] = Place(kind_of(call), block_of(call.module), _sum(own + before))
    return found


def _on_meta(value: Any, env: Mapping[str, Any]) -> Any:
    """An argument of a call, its values without memory."""

    def meta(x: Any) -> Any:
        x = env[x.name] if isinstance(x, Ref) else x
        if isinstance(x, torch.device):
            return torch.device("meta")
        return x.to("meta") if isinstance(x, torch.Tensor) else x

    return pytree.tree_map(meta, value)


def _sum(costs: Iterable[Cost]) -> Cost:
    each = list(costs)
    return Cost(sum(cost.flops for cost in each), sum(cost.bytes for cost in each))


def gather(
    events: Sequence[FunctionEvent], known: Mapping[str, Place], plain: Sequence[float], on_gpu: bool
) -> Profile:
    """Sum up what the profiler recorded. `known`: what lies behind each range's name."""

    def seconds(event: FunctionEvent) -> float:
        return 1e-6 * float(event.device_time_total if on_gpu else event.cpu_time_total)

    own = [event for event in events if event.device_type == DeviceType.CPU]  # ranges show on the GPU too
    steps = sorted((event for event in own if event.name == STEP), key=lambda event: event.time_range.start)
    starts = [event.time_range.start for event in steps]
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(steps))
    counts: dict[str, int] = defaultdict(int)
    for event in own:
        if event.name in known:
            spent[event.name][bisect_right(starts, event.time_range.start) - 1] += seconds(event)
            counts[event.name] += 1
    entries = tuple(Entry(name, known[name], counts[name] // len(steps), tuple(each)) for name, each in spent.items())
    outside = tuple(seconds(event) - sum(e.seconds[i] for e in entries) for i, event in enumerate(steps))
    walls = tuple(1e-6 * float(event.cpu_time_total) for event in steps)
    return Profile(entries, outside, walls, tuple(plain))


def report(found: Profile, options: Options, telemetry: Telemetry) -> Report:
    """As one report; `found.entries` by kind, by block, and the slowest of them."""
    on_gpu = torch.device(options.device).type == "cuda"
    plain, ranges = statistics.median(found.plain), statistics.median(found.steps)
    inside = statistics.median(map(sum, zip(*(entry.seconds for entry in found.entries), strict=True)))
    timed = "GPU time of their kernels" if on_gpu else "CPU time"
    says = (
        f"A step takes {1e3 * plain:.2f} ms (median of {options.rounds}); {1e3 * ranges:.2f} ms with ranges and the "
        f"profiler on, of which the plan's entries are {1e3 * inside:.2f} ms ({timed}).\nRates: of the arithmetic that "
        "an entry does, and of the bytes that it must move, each tensor passing memory once."
    )
    kinds, blocks = _sums(found, "kind"), _sums(found, "block")
    slowest = sorted(((e.name, e.calls, e.seconds, e.place.work) for e in found.entries), key=_median, reverse=True)
    parts: list[Part] = [
        Paragraph(says),
        _table("By kind of entry", "entry", [*kinds, ("(outside of entries)", None, found.outside, None)], found),
        _table("By block", "block", blocks, found),
        _table("The slowest entries", "entry", slowest[:10], found),
        _gpu(telemetry),
        Paragraph("\n".join(_commands(options, slowest[0][0]))),
        _figure("Milliseconds a step, by kind of entry", kinds),
        _figure("Milliseconds a step, by block", blocks),
    ]
    if options.trace is not None:
        parts.insert(1, Paragraph(f"{options.trace}: all {options.rounds} steps; ui.perfetto.dev shows it."))
    where = f"{options.tokens} tokens in {options.tokens.frames} frames"
    return Report(f"foal {options.variant}: profile of a step, {where}", machine(options.device), tuple(parts))


Row = tuple[str, int | None, tuple[float, ...], Cost | None]  # name, calls a step, seconds of each, work of a step


def _sums(found: Profile, key: str) -> list[Row]:
    """Entries of one kind or block together; kinds by their time, blocks as they follow each other."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in found.entries:
        groups[getattr(entry.place, key)].append(entry)
    rows: list[Row] = [
        (
            name,
            sum(e.calls for e in each),
            tuple(map(sum, zip(*(e.seconds for e in each), strict=True))),
            _sum(e.place.work for e in each),
        )
        for name, each in groups.items()
    ]
    return sorted(rows, key=_median, reverse=True) if key == "kind" else rows


def _median(row: Row) -> float:
    return statistics.median(row[2])


def _table(title: str, of: str, rows: Sequence[Row], found: Profile) -> Table:
    whole = [sum(each) for each in zip(found.outside, *(entry.seconds for entry in found.entries), strict=True)]

    def cells(name: str, calls: int | None, seconds: tuple[float, ...], work: Cost | None) -> tuple[Cell, ...]:
        share = statistics.median(part / all_ if all_ else 0.0 for part, all_ in zip(seconds, whole, strict=True))
        low, middle, high = statistics.quantiles([1e3 * each for each in seconds], n=4)
        rates = [each / middle / 1e6 for each in (work.flops, work.bytes)] if work and middle else [None, None]
        return name, calls, middle, low, high, 100 * share, *rates

    columns = (of, "calls", "ms a step", "lower quartile", "upper quartile", "% of the step", "GFLOP/s", "GB/s")
    return Table(title, columns, tuple(cells(*row) for row in rows))


def _figure(title: str, rows: Sequence[Row]) -> Figure:
    def bar(name: str, seconds: tuple[float, ...]) -> Bar:
        low, middle, high = (max(0.0, each) for each in statistics.quantiles([1e3 * each for each in seconds], n=4))
        return Bar(name, middle, low, high)

    return Figure(title, bars(title, [bar(name, seconds) for name, _, seconds, _ in rows], mark=0.0))


def _gpu(telemetry: Telemetry) -> Part:
    if telemetry.missing:
        return Paragraph(f"No telemetry of a GPU: {telemetry.missing}.")
    return Table("The GPU meanwhile", ("", "lowest", "mean", "highest"), tuple(telemetry.rows()))


def _commands(options: Options, slowest: str) -> Iterator[str]:
    """For what only NVIDIA's own profilers see."""
    gpu = torch.device(options.device).type == "cuda"
    yield "NVIDIA's profilers, over one step:" if gpu else "NVIDIA's profilers, over one step, on a machine with a GPU:"
    capture = "--capture-range=cudaProfilerApi --capture-range-end=stop"
    yield f"  nsys profile --trace=cuda,nvtx,cublas {capture} -o step {options.command}"
    only = shlex.quote(f"{slowest}/")
    yield f"  ncu --profile-from-start off --nvtx --nvtx-include {only} --set full -o slowest {options.command}"


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
