"""`horsepower roofline`: what a step of the released model must take on a GPU, kernel by kernel, and by each fusion."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.utils import _pytree as pytree

from horsepower.bench import step
from horsepower.bench.measure import machine
from horsepower.bench.plot import Bar, bars
from horsepower.bench.report import Cell, Figure, Paragraph, Report, Table
from horsepower.bench.roofline import Kernel, Rung, grouped, ladder
from horsepower.bench.step import Tokens
from horsepower.graph import provenance
from horsepower.graph.capture import capture
from horsepower.graph.graph import Graph
from horsepower.graph.passes import run
from horsepower.kernels.rates import GPU, GPUS, UNITS, Rates
from horsepower.quant.scheme import FP8, FP8_ATTENTION, FP8_WEIGHTS, Scheme, scheme_of
from horsepower.runtime.fused import VELOCITY_SHAPES, velocity_example
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.presets import PIPELINES, ModelName
from horsepower.runtime.tokens import Grid

SCHEMES = (FP8_WEIGHTS, FP8, FP8_ATTENTION)  # whose kernels are ours; those of scales a tensor are the library's
KERNELS = "The plan's kernels"  # a title
SECONDS, TEXT = 5, 400  # of the clip that published times are of; tokens of a typical prompt
LEGEND = (
    "time of a kernel = max(FLOPs / rate of its unit, bytes / bandwidth); a step is the sum of its kernels. Units: "
    "matrix, fp8, attention, attention_fp8, vector (float32 without matrix units). FLOPs: 2 for a multiplication and "
    "an addition. Bytes: what a kernel reads and writes, each once. floor: at the datasheet's rates. predicted: at the "
    "rates that the best published kernels reach. Launches, a grid's last wave and caches are not counted."
)
LADDER = (
    "Counted on the graph itself. Chains: connected elementwise calls, norms and copies between two products are one "
    "kernel, the best that Inductor can do. Parts: each fused operator is the library's product and one epilogue of "
    "ours. Plan: as it is compiled for this GPU, epilogues inside the products; then under each scheme of eight bits. "
    "In no rung: a product whose rows are not 16 bytes aligned (13652 columns) is slow; the plan pads it."
)


def tokens_of(resolution: str) -> Tokens:
    """Of the last stage of a pipeline (256p, 540p, 1080p), for a clip of 5 seconds. Raises ValueError."""
    variant_of(resolution)
    pipeline = PIPELINES[resolution]
    grid = Grid.of(pipeline.width, pipeline.height, SECONDS * 25 + 1)
    return Tokens(grid.video, grid.audio, TEXT, grid.frames)


def variant_of(resolution: str) -> ModelName:
    """The model of a pipeline's last stage. Raises ValueError."""
    if resolution not in PIPELINES:
        raise ValueError(f"resolution: got {resolution!r}, allowed: {', '.join(PIPELINES)}")
    return PIPELINES[resolution].super_resolution or "distill"


def graphs_of(model: DiT, target: str, schemes: Sequence[Scheme] = SCHEMES) -> tuple[Graph, Graph, dict[str, Graph]]:
    """A step of a model on the meta device: captured; with each fused operator as its parts; as the target runs it.

    The last by name: as it is, and under each scheme that the target has the arithmetic for.
    """
    captured = capture(model, velocity_example(model), None, VELOCITY_SHAPES, "velocity")
    able = (None, *(scheme for scheme in schemes if target in scheme.targets))
    starts = {plan_name(each): replace(provenance.snapshot(captured), target=target, scheme=each) for each in able}
    return captured, run(provenance.snapshot(captured)), {name: run(start) for name, start in starts.items()}


def plan_name(scheme: Scheme | None) -> str:
    """Of a rung."""
    return "plan" if scheme is None else f"plan, {scheme.name}"


def predict(gpu: str, resolution: str, tokens: Tokens | None = None, scheme: str | Scheme | None = None) -> Report:
    """The report on a denoising step of a pipeline's last stage; `tokens`: others than those of a clip of 5 seconds.

    scheme: of the plan whose kernels are listed. Raises ValueError for a GPU, a resolution or a scheme that is not
    known, or that the GPU cannot compute.
    """
    variant, chosen, scheme = variant_of(resolution), _gpu(gpu), scheme_of(scheme)
    if scheme is not None:
        scheme.check(chosen.target)
    tokens = tokens or tokens_of(resolution)
    model = step.released(variant)
    inputs = pytree.tree_leaves(velocity_example(model, tokens.counts, tokens.frames))
    captured, parts, plans = graphs_of(model, chosen.target)
    rungs = ladder(captured, parts, plans, inputs)
    title = f"Roofline of a step: {variant}, {tokens} tokens in {tokens.frames} frames, on one {chosen.name}"
    shown = (Paragraph(LEGEND), _rates(chosen), _ladder(rungs, chosen), _plot(rungs, chosen.reached))
    plan, timed = next(rung for rung in rungs if rung.name == plan_name(scheme)), {}
    if gpu == "here":
        from horsepower.bench.timed import kernel_seconds

        timed = kernel_seconds(plans[plan.name], inputs)
    return Report(title, machine(), (*shown, _kernels(plan, chosen, timed), Paragraph(_measured(timed))))


def _gpu(name: str) -> GPU:
    """A known GPU, or the one at hand with its measured rates."""
    if name == "here" and torch.cuda.is_available():
        from horsepower.bench.ceilings import measure

        return measure(torch.device("cuda"))
    if name not in GPUS:
        here = "; here, with a GPU" if name == "here" else ", here"
        raise ValueError(f"gpu: got {name!r}, allowed: {', '.join(GPUS)}{here}")
    return GPUS[name]


def unmeasured(resolution: str, tokens: Tokens, why: str) -> Report:
    """The predicted ladder of a step on an H100, for who asked for a measured one. Raises ValueError."""
    report = predict("h100", resolution, tokens)
    says = Paragraph(f"Nothing was measured: {why}. This is what a step is predicted to take.")
    kept = (part for part in report.parts if not isinstance(part, Table) or part.title != KERNELS)
    return replace(report, parts=(says, *kept))


def _rates(gpu: GPU) -> Table:
    def tera(rate: float | None) -> float | None:
        return None if rate is None else rate / 1e12

    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (name, tera(getattr(gpu.peak, field)), tera(getattr(gpu.reached, field)))
        for name, field in (
            ("matrix, bfloat16, TFLOP/s", "matrix"),
            ("matrix, FP8, TFLOP/s", "fp8"),
            ("attention, bfloat16, TFLOP/s", "attention"),
            ("attention, FP8, TFLOP/s", "attention_fp8"),
            ("vector, float32, TFLOP/s", "vector"),
            ("memory, TB/s", "memory"),
        )
    )
    return Table("Rates", (gpu.name, "datasheet", "reached"), rows)


def _ladder(rungs: tuple[Rung, ...], gpu: GPU) -> Table:
    eager = rungs[0].seconds(gpu.reached)
    rows: list[tuple[Cell, ...]] = []
    for rung in rungs:
        whole, *parts = (rung.seconds(gpu.reached, unit) for unit in (None, *UNITS))
        done = (len(rung.kernels), rung.total("flops") / 1e12, rung.total("bytes") / 1e9)
        times = (rung.seconds(gpu.peak), *parts, whole)
        rows.append((rung.name, *done, *(1e3 * t for t in times), eager / whole))
    columns = ("compiled so", "kernels", "TFLOP", "GB", "floor ms", *(f"{unit} ms" for unit in UNITS), "predicted ms")
    return Table("The ladder of a step", (*columns, "x eager"), tuple(rows), LADDER)


def _plot(rungs: tuple[Rung, ...], rates: Rates) -> Figure:
    times = [rung.seconds(rates) / rungs[-1].seconds(rates) for rung in rungs]
    rows = [Bar(rung.name, time, time, time) for rung, time in zip(rungs, times, strict=True)]
    return Figure("Predicted time of a step, in multiples of the last rung's", bars("Predicted time of a step", rows))


def _kernels(plan: Rung, gpu: GPU, measured: Mapping[Kernel, float]) -> Table:
    """measured: seconds of one run, of the kernels that were timed."""
    rows: list[tuple[Cell, ...]] = []
    for kernel, n in sorted(grouped(plan.kernels), key=lambda each: -each[1] * gpu.reached.seconds(each[0])):
        floor, predicted = (rates.seconds(kernel) for rates in (gpu.peak, gpu.reached))
        took = measured.get(kernel)
        work = (kernel.flops / 1e9, kernel.bytes / 1e6, kernel.flops / kernel.bytes, gpu.reached.bound(kernel))
        times = (1e6 * floor, 1e6 * predicted, 1e3 * n * predicted)
        timed = (None, None) if took is None else (1e6 * took, floor / took)
        rows.append((kernel.name, kernel.where, n, *work, *times, *timed))
    done = ("kernel", "where", "runs", "GFLOP", "MB", "FLOP a byte", "waits for")
    times_of = ("floor us", "predicted us", "all of them ms", "measured us", "share of the floor")
    return Table(KERNELS, (*done, *times_of), tuple(rows), "GFLOP, MB and us are of one run.")


def _measured(timed: Mapping[Kernel, float]) -> str:
    if timed:
        return (
            "Measured: the median of a kernel's rounds, as a CUDA graph by itself on random values, its weights from "
            "memory. What is torch's own, such as embedders and heads, was not timed."
        )
    why = "--gpu here measures them" if torch.cuda.is_available() else "this machine has no GPU"
    return f"Measured times are missing: {why}. What is predicted here is arithmetic, not a measurement."
