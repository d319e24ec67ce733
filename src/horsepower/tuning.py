"""`horsepower tune`: the fastest way to compute each site of the released model, measured on the GPU at hand."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from horsepower.bench import step
from horsepower.bench.measure import machine
from horsepower.bench.report import Cell, Paragraph, Part, Report, Table
from horsepower.bench.tune import ROUNDS, Job, cuda_timer, jobs_of, tune
from horsepower.doctor import driver
from horsepower.graph import provenance
from horsepower.graph.capture import capture
from horsepower.graph.graph import Graph
from horsepower.graph.passes import PASSES, run
from horsepower.graph.passes.lower import lower
from horsepower.kernels import tables
from horsepower.kernels.choice import TOKENS, candidates, choose, predicted
from horsepower.kernels.registry import OPS
from horsepower.kernels.tables import Point
from horsepower.kernels.target import GPUS, target_of
from horsepower.predicting import SCHEMES, tokens_of
from horsepower.runtime.fused import VELOCITY_SHAPES, velocity_example
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.presets import PIPELINES

METHOD = (
    f"Each candidate is run as a CUDA graph, {ROUNDS} rounds in which all take turns, after 256 MiB were written so "
    "that weights come from memory; lower quartile, median, upper quartile of one run. First its results are checked "
    "against float64 on some rows: what is further from it than plain PyTorch is never chosen. parts: the library's "
    "product and a kernel behind it, as a plan runs them."
)
NOTHING = (
    "Nothing was measured and nothing written: this machine has no GPU. Below is what would be measured, and what the "
    "roofline predicts until then."
)


def tune_released(
    resolutions: Sequence[str] = (), ops: Sequence[str] = (), output: str | None = None, arch: str | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Report:  # fmt: skip
    """Measure the sites of these pipelines' last stages, or of all, for clips of 5 seconds, and write the tables.

    output: a folder for them, by default the package's own, where they are read. arch: where there is no GPU, what to
    predict for. Raises ValueError for a resolution, operator, folder or architecture that is not there.
    """
    resolutions = tuple(dict.fromkeys(resolutions)) or tuple(PIPELINES)
    for resolution in resolutions:
        if resolution not in PIPELINES:
            raise ValueError(f"resolution: got {resolution!r}, allowed: {', '.join(PIPELINES)}")
    gpu = target_of(torch.device("cuda")) if torch.cuda.is_available() else None
    arch = arch or gpu or "sm_90"
    if arch not in ((gpu,) if gpu else GPUS):
        raise ValueError(f"arch: got {arch!r}, allowed: {gpu or ', '.join(GPUS)}")
    folder = tables.FOLDER if output is None else Path(output)
    place = folder if folder.is_dir() or output is not None else folder.parent
    if not place.is_dir() or (gpu and not os.access(place, os.W_OK)):
        raise ValueError(f"output: got {str(folder)!r}, allowed: a folder that is there and can be written to")
    known = [op.name for op in OPS.values() if candidates(op, arch)]
    for op in ops:
        if op not in known:
            raise ValueError(f"op: got {op!r}, allowed: {', '.join(sorted(known))}")
    jobs = [job for job in jobs_at(resolutions, arch) if job.op.name in (ops or known)]
    title = f"Choices for {arch} at {', '.join(resolutions)}"
    if gpu is None:
        return Report(title, machine(), (Paragraph(NOTHING), _ways(jobs, arch), chosen(jobs, arch)))
    folder.mkdir(exist_ok=True)
    done = tune(jobs, arch, _machine(), folder, cuda_timer, say=say)
    parts: list[Part] = [Paragraph(METHOD), _measured(done)]
    if output is None:
        parts.append(chosen(jobs, arch))
    written = ", ".join(sorted({f"{job.op.name}.{arch}.json" for job, _ in done}))
    return Report(title, machine("cuda"), (*parts, Paragraph(f"Written to {folder}: {written}.")))


def jobs_at(resolutions: Sequence[str], arch: str) -> list[Job]:
    """The distinct sites of the pipelines' last stages with their fusions, and of the parts of these; in 16 bits, and
    under each scheme that leaves a choice."""
    found: dict[tuple[str, object], Job] = {}
    for resolution in resolutions:
        model = step.released(PIPELINES[resolution].super_resolution or "distill")
        tokens = tokens_of(resolution)
        inputs = velocity_example(model, tokens.counts, tokens.frames)
        for graph in _fused(model, arch):
            for job in jobs_of(graph, pytree.tree_leaves(inputs), parts=True):
                found.setdefault((job.op.name, job.site), job)
    return list(found.values())


def _fused(model: DiT, arch: str) -> Iterator[Graph]:
    captured = capture(model, velocity_example(model), None, VELOCITY_SHAPES, "velocity")
    for scheme in (None, *(each for each in SCHEMES if arch in each.targets)):
        graph = replace(provenance.snapshot(captured), target=arch, scheme=scheme)
        yield run(graph, [each for each in PASSES if each is not lower])


def chosen(jobs: Sequence[Job], arch: str, whole: bool = False) -> Table:
    """How each site is computed, and why. whole: as in a plan, in which no operator is taken apart any more."""
    rows: list[tuple[Cell, ...]] = []
    for job in jobs:
        choice = choose(job.op, job.inputs, arch, whole)
        if choice is None:
            found: tuple[Cell, ...] = ("the reference", None, "", "no kernel takes it")
        else:
            seconds = predicted(job.op, job.inputs, arch, choice.candidate.kernel)
            found = (str(choice.candidate), 1e6 * seconds, choice.source, choice.why)
        rows.append((job.op.name, job.site.tokens, job.runs, *found, job.site.key))
    note = (
        "measured: by `horsepower tune`, at the nearest number of tokens. predicted: by the roofline, with a share of "
        "the library's rate for Triton; a kernel's first configuration. us: by that roofline. A plan, which holds for "
        f"all lengths, decides at {TOKENS} tokens what it computes as parts."
    )
    columns = ("op", "tokens", "runs", "candidate", "predicted us", "chosen as", "because", "site")
    return Table("Choices", columns, tuple(rows), note)


def _ways(jobs: Sequence[Job], arch: str) -> Table:
    ops = {job.op.name: job.op for job in jobs}
    rows = tuple((name, way.kernel, way.config) for name, op in ops.items() for way in candidates(op, arch))
    return Table(
        "Candidates",
        ("op", "kernel", "configuration"),
        rows,
        "At every site of the operator; what begins with fp8 or w8a16, where operands are.",
    )


def _measured(done: Sequence[tuple[Job, Point]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for job, point in done:
        best = point.best()
        for timed in sorted(point.timed, key=lambda each: each.median):
            low, median, high = timed.us or (None, None, None)
            note = timed.failed or ("the fastest" if timed is best else "")
            rows.append((job.op.name, job.site.tokens, str(timed.candidate), low, median, high, note, job.site.key))
    columns = ("op", "tokens", "candidate", "low us", "median us", "high us", "", "site")
    return Table("Measured", columns, tuple(rows))


def _machine() -> dict[str, str]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver() or "unknown",
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "date": date.today().isoformat(),
    }
