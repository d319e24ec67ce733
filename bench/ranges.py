"""Ranges named after a plan's entries: in torch's profiler, in NVTX, and what they add up to."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function
from torch.utils import _pytree as pytree

from horsepower.graph.call import Call, Ref
from horsepower.graph.explain import cost_of
from horsepower.graph.operators import operator_of
from horsepower.graph.plan import Plan
from horsepower.kernels.registry import Cost

STEP = "denoising step"


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


def marked(name: str, nvtx: bool) -> ExitStack:
    """A range of torch's profiler, and of NVTX too, from now until it is closed."""
    ranges = ExitStack()
    ranges.enter_context(record_function(name))
    if nvtx:
        ranges.enter_context(torch.cuda.nvtx.range(name))
    return ranges


def ranged(nvtx: bool) -> Callable[[Call, Callable[[Any], None]], Callable[[Any], None]]:
    """For `Executor.watched`: each call in a range."""

    def around(call: Call, execute: Callable[[Any], None]) -> Callable[[Any], None]:
        name = range_name(call)

        def run(env: Any) -> None:
            with marked(name, nvtx):
                execute(env)

        return run

    return around


def traced(run: Callable[[], object], device: torch.device, file: str | None) -> list[FunctionEvent]:
    """What torch's profiler sees of a run; written to `file` as chrome://tracing reads it."""
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *cuda]) as trace:
        run()
    if file is not None:
        trace.export_chrome_trace(file)
    return list(trace.events() or ())


def finish(device: torch.device) -> None:
    """Wait for what was started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
            found[name] = Place(kind_of(call), block_of(call.module), total(own + before))
    return found


def _on_meta(value: Any, env: Mapping[str, Any]) -> Any:
    """An argument of a call, its values without memory."""

    def meta(x: Any) -> Any:
        x = env[x.name] if isinstance(x, Ref) else x
        if isinstance(x, torch.device):
            return torch.device("meta")
        return x.to("meta") if isinstance(x, torch.Tensor) else x

    return pytree.tree_map(meta, value)


def total(costs: Iterable[Cost]) -> Cost:
    """Of several calls."""
    each = list(costs)
    return Cost(sum(cost.flops for cost in each), sum(cost.bytes for cost in each))


def gather(events: Iterable[FunctionEvent], known: Mapping[str, Place], on_gpu: bool) -> Profile:
    """Sum up the steps that the profiler recorded. `known`: what lies behind each range's name."""

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
    return Profile(entries, outside, walls)
