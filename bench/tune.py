"""Which way to compute a site is the fastest on the GPU at hand: every candidate is checked, then all take turns.

A candidate is timed as a plan runs it: as a CUDA graph, with weights that come from memory, not from the L2 cache. It
is checked on rows beside the edges of modalities and frames, and some others, against float64: what is further from it
than plain PyTorch is reported and never chosen.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from horsepower.bench.measure import turn
from horsepower.graph.compare import ULP
from horsepower.graph.exact import beside
from horsepower.graph.explain import Measured
from horsepower.graph.graph import Graph
from horsepower.kernels import tables
from horsepower.kernels.attention import ATTENTION
from horsepower.kernels.attention_ranges import gate_factor, key_ranges
from horsepower.kernels.choice import candidates
from horsepower.kernels.float8 import E4M3, arithmetic, codes_of, widen
from horsepower.kernels.registry import Op, op_of
from horsepower.kernels.tables import PARTS, WEIGHTS, Candidate, Point, Site, Table, Timed, arguments, configs

Run: TypeAlias = Callable[[], Sequence[Tensor]]  # returns the results
Timer: TypeAlias = Callable[[Mapping[Candidate, Run]], Mapping[Candidate, Sequence[float]]]  # seconds in each round

FEW = 2.0**-8  # of codes, which are right or a neighbour: four times that is the relative L2 of 3 % neighbours
CODES = 64.0  # the standard deviation of e4m3 codes that are drawn: few are beyond the largest, 448
SCALES = ("x_scale", "weight_scale", "inverse", "scales")
DRAWN = 32  # rows that are checked besides those at edges
ROUNDS, WARMUP = 21, 3
FLUSH = 2**28  # bytes written between two runs: several times an L2 cache, and long enough to queue what follows


@dataclass(frozen=True)
class Job:
    """A site to measure."""

    op: Op
    inputs: tuple[Any, ...]  # in the order of the schema, tensors on the meta device
    runs: int  # in a step

    @property
    def site(self) -> Site:
        return Site.of(self.op, self.inputs)


def jobs_of(graph: Graph, inputs: Sequence[Any], parts: bool = False) -> list[Job]:
    """The distinct sites of a graph at the sizes of its flattened inputs, of operators with a kernel for GPUs.

    parts: those of the operators that they expand to, too.
    """
    found: dict[tuple[str, Site], list[tuple[Op, tuple[Any, ...]]]] = {}

    def collect(target: Any, *given: Any) -> Any:
        op = op_of(str(target))
        if op is not None and any("cuda" in kernel.devices for kernel in op.kernels):
            found.setdefault((op.name, Site.of(op, given)), []).append((op, given))
            if parts and op.expand is not None:
                op.expand(collect, *given)
        return target(*given)

    fixed = graph.fixed()
    for node, given in Measured.of(graph, inputs).given.items():
        if node not in fixed:
            collect(node.target, *given)
    return [Job(*calls[0], len(calls)) for calls in found.values()]


def tune(
    jobs: Iterable[Job], arch: str, machine: Mapping[str, str], folder: Path, timer: Timer, device: str = "cuda",
    say: Callable[[str], object] = lambda line: None,
) -> list[tuple[Job, Point]]:  # fmt: skip
    """Measure all candidates of each site and write the operators' tables, each anew, into a folder.

    Operators that others expand to come first: in the package's own folder their tables serve the others' parts.
    Raises ValueError for a folder that is not there.
    """
    if not folder.is_dir():
        raise ValueError(f"output: got {str(folder)!r}, allowed: a folder that is there")
    by_op: dict[str, list[Job]] = {}
    for job in sorted(jobs, key=lambda job: (job.op.expand is not None, job.op.name)):
        by_op.setdefault(job.op.name, []).append(job)
    done: list[tuple[Job, Point]] = []
    for name, its in by_op.items():
        sites: dict[str, list[Point]] = {}
        for job in its:
            say(f"{name}, {job.site.tokens} tokens: {job.site.key}")
            point = measure(job, arch, timer, device)
            sites.setdefault(job.site.key, []).append(point)
            done.append((job, point))
        ordered = {key: tuple(sorted(points, key=lambda point: point.tokens)) for key, points in sites.items()}
        tables.write(Table(name, arch, machine, ordered), folder)
    return done


def measure(job: Job, arch: str, timer: Timer, device: str = "cuda") -> Point:
    """Check and time every candidate of a site."""
    op, inputs = job.op, filled(job, device)
    outputs = op.outputs(*inputs)
    rows = _rows(op, inputs)
    exact, plain = (_truth(op, inputs, rows, dtype) for dtype in (torch.float64, None))
    runs: dict[Candidate, Run] = {}
    failed: dict[Candidate, str] = {}
    ways = candidates(op, arch, inputs)
    for way in ways:
        run = _runner(op, way, arch, inputs, outputs)
        try:
            reason = _refusal(op, way, inputs) or _fault(op, run, outputs, rows, exact, plain)
        except Exception as error:  # out of resources, or whatever a library raises
            _finish(device)  # raises if the GPU is lost, and all further measurements with it
            reason = " ".join(str(error).split())[:200] or type(error).__name__
        if reason is None:
            runs[way] = run
        else:
            failed[way] = reason
    seconds = timer(runs) if runs else {}
    return Point(
        job.site.tokens,
        tuple(
            Timed(way, failed=failed[way]) if way in failed else Timed(way, _quartiles(seconds[way])) for way in ways
        ),
    )


def _quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Lower, median and upper, in microseconds."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return round(1e6 * low, 2), round(1e6 * median, 2), round(1e6 * high, 2)


def filled(job: Job, device: str) -> tuple[Any, ...]:
    """A site's inputs with random values: their sizes as in a model, where they count."""
    generator = torch.Generator(device).manual_seed(0)

    def made(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        scale = x.shape[-1] ** -0.5 if name == "weight" else 1.0
        if x.dtype == E4M3:
            codes = torch.empty_strided(x.shape, x.stride(), dtype=E4M3, device=device)
            return codes.copy_(torch.empty(x.shape, device=device).normal_(0, CODES, generator=generator))
        if name == "scales":  # of queries times keys, and of values
            return torch.tensor([CODES**-2, 1 / CODES], dtype=x.dtype, device=device)
        if name in SCALES:  # so that what the codes stand for has the same size
            depth = job.inputs[1].shape[-1]  # of weights, where there are scales of them
            scale = {"x_scale": 1.0, "weight_scale": depth**-0.5, "inverse": CODES**2}[name] / CODES
            return torch.full(x.shape, scale, dtype=x.dtype, device=device)
        values = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return values.normal_(0, scale, generator=generator)

    return tuple(made(name, x) for name, x in zip(arguments(job.op.schema), job.inputs, strict=False))


def _runner(op: Op, way: Candidate, arch: str, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> Run:
    if way.kernel == PARTS:
        assert op.expand is not None
        return partial(op.expand, lambda target, *given: target(*given), *inputs)
    size = op.workspace(["cuda"], *inputs)
    workspace = outputs[0].new_empty(size, dtype=torch.uint8) if size else None

    def run() -> Sequence[Tensor]:
        if way.config is not None:
            twin = import_module(f"horsepower.kernels.gpu.{op.name}")
            twin.run(outputs, workspace, *inputs, config=configs(op.name, arch)[way.config])
        else:
            kernel = next(kernel for kernel in op.kernels if kernel.name == way.kernel)
            kernel.run(outputs, workspace, *inputs)
        return outputs

    return run


def _refusal(op: Op, way: Candidate, inputs: Sequence[Any]) -> str | None:
    return next((kernel.supports(*inputs) for kernel in op.kernels if kernel.name == way.kernel), None)


def _fault(
    op: Op, run: Run, outputs: Sequence[Tensor], rows: Tensor, exact: Sequence[Tensor], plain: Sequence[Tensor]
) -> str | None:  # fmt: skip
    """What is wrong with the results, or None: the rule of `horsepower verify`."""
    for output in outputs:
        output.fill_(torch.nan)
    for got, right, eager in zip(run(), exact, plain, strict=True):
        if not bool((got.float() if got.dtype == E4M3 else got).isfinite().all()):
            return "wrong: it leaves values that are not finite"
        size = right.double().norm()
        error, own = (float((x.double() - right.double()).norm() / size) for x in (_picked(op, got, rows), eager))
        if error > max(1.1 * own, 4 * (FEW if got.dtype == E4M3 else ULP[got.dtype])):
            return f"wrong: its error is {error:.2g}, that of plain PyTorch {own:.2g}"
    return None


def _rows(op: Op, inputs: Sequence[Any]) -> Tensor:
    """The rows that are checked."""
    named = dict(zip(arguments(op.schema), inputs, strict=False))
    L, device = inputs[0].shape[0], inputs[0].device
    edges = list(accumulate(named.get("counts") or ()))
    if named.get("window", -1) >= 0:
        ranges = key_ranges(named["frames"], named["video"], named["window"], L, L)
        edges += [queries.start for queries, _ in ranges]
    drawn = torch.randperm(L, generator=torch.Generator().manual_seed(0))[:DRAWN]
    return torch.tensor(sorted({*beside(edges, L), *drawn.tolist()}), dtype=torch.long, device=device)


def _truth(op: Op, inputs: Sequence[Any], rows: Tensor, dtype: torch.dtype | None) -> Sequence[Tensor]:
    """Some rows of the results by plain PyTorch, in a wider dtype if one is given."""
    if op.name == "attention":
        return (_attention(rows, *_cast(inputs, dtype)),)
    made = _plain(op, *_cast(_sampled(op, inputs, rows), dtype))
    return [_picked(op, each, torch.arange(len(rows), device=rows.device)) for each in made]


def _picked(op: Op, result: Tensor, rows: Tensor) -> Tensor:
    """Rows of a result; one that is turned has them last."""
    return result[..., rows] if op.name == "transpose_to_codes" else result[rows]


def _cast(inputs: Any, dtype: torch.dtype | None) -> Any:
    def cast(value: Any) -> Any:
        if dtype is None or not isinstance(value, Tensor | torch.dtype) or value is E4M3:
            return value
        return value.to(dtype) if isinstance(value, Tensor) else dtype

    return pytree.tree_map(cast, tuple(inputs))


def _sampled(op: Op, inputs: Sequence[Any], rows: Tensor) -> Sequence[Any]:
    def sampled(name: str, value: Any) -> Any:
        if name == "counts":
            ends = list(accumulate(value, initial=0))
            return [int(((rows >= a) & (rows < b)).sum()) for a, b in pairwise(ends)]
        return value[rows] if isinstance(value, Tensor) and name not in WEIGHTS else value

    return [sampled(name, value) for name, value in zip(arguments(op.schema), inputs, strict=False)]


def _plain(op: Op, *inputs: Any) -> Sequence[Tensor]:
    """An operator by its reference, or its parts by theirs."""

    def call(target: Any, *given: Any) -> Any:
        part = op_of(str(target))
        if part is None:
            return target(*given)
        made = _plain(part, *given)
        return made[0] if part.single else made

    return op.expand(call, *inputs) if op.expand is not None else op.reference(*inputs)


def _attention(
    rows: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, experts: int, counts: Sequence[int],
    frames: int, video: int, window: int, inverse: Tensor | None = None, scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Some rows of an attention over many: one range of keys after another."""
    if inverse is not None:
        if scales is None:
            q, k, v = (widen(x) for x in (q, k, v))
        made = _attention(rows, q, k, v, gate, experts, counts, frames, video, window, None, scales)
        return codes_of(widen(made), inverse)
    out = torch.empty(len(rows), *q.shape[1:], dtype=arithmetic(q.dtype), device=q.device)
    for queries, keys in key_ranges(frames, video, window, len(q), len(k)):
        mine = (rows >= queries.start) & (rows < queries.stop)
        if not bool(mine.any()):
            continue
        seen = torch.cat([torch.arange(part.start, part.stop, device=k.device) for part in keys])
        values = v[seen] if scales is None else v[..., seen]
        (out[mine],) = ATTENTION.reference(q[rows[mine]], k[seen], values, None, 1, [], 1, 0, -1, None, scales)
    factor = 1 if gate is None else gate_factor(gate, experts, counts, len(q))[rows]
    return (out * factor).to(out.dtype)


def cuda_timer(runs: Mapping[Candidate, Run]) -> Mapping[Candidate, tuple[float, ...]]:
    """Seconds of each candidate in each round on the current GPU, the order rotated from round to round."""
    started = {way: _captured(run) for way, run in runs.items()}
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    events: dict[Candidate, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {way: [] for way in started}
    for i in range(-WARMUP, ROUNDS):
        for way in turn(list(started), i):
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            pair[0].record()
            started[way]()
            pair[1].record()
            if i >= 0:
                events[way].append(pair)
        torch.cuda.synchronize()
    return {way: tuple(1e-3 * a.elapsed_time(b) for a, b in pairs) for way, pairs in events.items()}


def _captured(run: Run) -> Callable[[], object]:
    """Its replay as a CUDA graph; itself, as in a plan, if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        return run
    return graph.replay


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
