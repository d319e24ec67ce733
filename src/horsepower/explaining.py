"""`horsepower explain`: what the compiler made of a model, in words, numbers and a drawing of each kind of block."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from horsepower.bench import step
from horsepower.bench.measure import machine
from horsepower.bench.report import Cell, Figure, Paragraph, Part, Report, Table
from horsepower.bench.step import Tokens
from horsepower.bench.tune import jobs_of
from horsepower.drawing import svg
from horsepower.graph import provenance
from horsepower.graph.capture import capture
from horsepower.graph.diagram import diagram, groups_of
from horsepower.graph.explain import Explanation, Fusion, blocks_of, measure
from horsepower.graph.formats import Format, formats
from horsepower.graph.graph import Graph
from horsepower.graph.passes import PASSES, Pass
from horsepower.graph.plan import Plan, plan_of
from horsepower.kernels.native_library import ISAS
from horsepower.kernels.target import check_target
from horsepower.quant.scheme import Scheme, scheme_of
from horsepower.runtime.executor import weights_of
from horsepower.runtime.fused import VELOCITY_SHAPES, velocity_example
from horsepower.tuning import chosen


def explain(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    inputs: tuple[Any, ...] | None = None,
    example_keywords: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    method: str = "forward",
    only: Sequence[Pass] = PASSES,
    title: str = "The plan of a module",
    target: str = "cpu",
    scheme: str | Scheme | None = None,
) -> Report:
    """Compile `module.method` as `horsepower.compile` does and say what became of it.

    inputs: positional arguments at the sizes to count for; None takes the examples. Only shapes and dtypes matter.
    target: what to compile for; no such device is needed. The other arguments are those of `horsepower.compile`.
    Raises CaptureError for code that cannot be one graph, ValueError for inputs that the plan does not take.
    """
    start = time.perf_counter()
    captured = capture(module, example_inputs, example_keywords, dynamic_shapes, method)
    captured.target, captured.scheme = check_target(target), scheme_of(scheme)
    if captured.scheme is not None:
        captured.scheme.check(target)
    compiled = provenance.snapshot(captured)
    changed = provenance.rewrite(compiled, only)
    plan = plan_of(compiled)
    seconds = time.perf_counter() - start
    flat, sizes = plan.contract.check(inputs or example_inputs, dict(example_keywords or {}))
    found = measure(captured, compiled, changed, flat)
    weights = sum(x.nbytes for x in {id(x): x for x in weights_of(module).values()}.values())
    parts: tuple[Part, ...] = (
        Paragraph(_summary(found, compiled, seconds)),
        _totals(found, plan, plan.at(sizes).peak, weights),
        _kinds(found),
        _fusions(found),
        *([] if captured.scheme is None else [_formats(compiled)]),
        _refusals(found, [each.__name__ for each in only]),
        *([] if target == "cpu" else [chosen(jobs_of(compiled, flat), target, whole=True)]),
        *_figures(found, captured, compiled),
    )
    return Report(title, machine(), parts)


def explain_preset(
    preset: str, variant: str, tokens: Tokens, target: str = "cpu", scheme: str | Scheme | None = None
) -> Report:
    """On a step of the built-in preset "foal", or of the "released" sizes, which needs none of their memory."""
    model = step.preset(variant) if preset == "foal" else step.released(variant)
    what = target if (chosen := scheme_of(scheme)) is None else f"{target} in {chosen.name}"
    title = f"{preset} {variant}: the plan of a step for {what}, at {tokens} tokens in {tokens.frames} frames"
    example, inputs = velocity_example(model), velocity_example(model, tokens.counts, tokens.frames)
    return explain(model, example, inputs, None, VELOCITY_SHAPES, "velocity", PASSES, title, target, chosen)


def _summary(found: Explanation, compiled: Graph, seconds: float) -> str:
    blocks = [kind for kind in found.kinds if kind.blocks != ("",)]
    layers = sum(len(kind.blocks) for kind in blocks)
    kinds = f"{len(blocks)} kind" + "s" * (len(blocks) != 1)
    return (
        f"{layers} blocks of {kinds}, {compiled.traced} of them traced; compiled in {seconds:.1f} s. "
        f"A run is {found.after.calls} kernel calls instead of {found.before.calls}, moves "
        f"{_bytes(found.after.bytes)} instead of {_bytes(found.before.bytes)}, and computes "
        f"{found.after.flops / 1e9:.1f} GFLOP. {found.load} calls depend on weights alone and run once, at load."
    )


def _totals(found: Explanation, plan: Plan, planned: int, weights: int) -> Table:
    rows: tuple[tuple[Cell, ...], ...] = (
        ("kernel calls", found.before.calls, found.after.calls),
        ("moved", _bytes(found.before.bytes), _bytes(found.after.bytes)),
        ("GFLOP", found.before.flops / 1e9, found.after.flops / 1e9),
        ("FLOP a byte", _ratio(found.before.flops, found.before.bytes), _ratio(found.after.flops, found.after.bytes)),
        ("values alive at once", _bytes(found.peak_before), _bytes(found.peak_after)),
        ("planned peak", None, _bytes(planned)),
        ("weights", _bytes(weights), _bytes(plan.weight_bytes)),
    )
    kernels = ISAS[0] if plan.target == "cpu" else plan.target
    note = (
        "Each call reads its inputs and writes its outputs once; caches are not counted. Values alive: the most at any "
        "time if each is freed after its last use, without inputs and weights. Planned peak: these with the kernels' "
        f"scratch memory ({kernels}) as they lie in the arena: what a run takes beside inputs and outputs."
    )
    return Table("In all", ("", "captured", "compiled"), rows, note)


def _kinds(found: Explanation) -> Table:
    rows = tuple(
        (
            kind.name, kind.before.calls, kind.after.calls, kind.before.bytes / 2**20, kind.after.bytes / 2**20,
            kind.before.flops / 1e9, kind.after.flops / 1e9,
        )
        for kind in found.kinds
    )  # fmt: skip
    columns = ("blocks", "calls", "compiled calls", "MiB", "compiled MiB", "GFLOP", "compiled GFLOP")
    note = "A projection that is fused with the norm after it counts in the block of that norm."
    return Table("By kind of block", columns, rows, note)


def _fusions(found: Explanation) -> Table:
    rows = tuple(
        (kind.name, fusion.rewrite, fusion.count, " + ".join(fusion.kernels), _replaced(fusion))
        for kind in found.kinds
        for fusion in kind.fusions
    )
    return Table("Fused", ("blocks", "rewrite", "sites", "kernels", "instead of"), rows)


def _formats(compiled: Graph) -> Table:
    """What each linear layer is computed in; equal layers of all blocks in one row."""
    found: dict[Format, list[str]] = {}
    for each in formats(compiled):
        found.setdefault(replace(each, block=""), []).append(each.block)
    rows = tuple(
        (each.layer, blocks_of(blocks), len(blocks), each.weight, each.input, each.scales, each.quantiser, each.kept)
        for each, blocks in found.items()
    )
    columns = ("layer", "blocks", "sites", "weight", "input", "its scales", "quantised by", "")
    note = "Scales of weights are by output channel. Static ones lie in those of the weight: they cost nothing."
    return Table("Formats", columns, rows, note)


def _replaced(fusion: Fusion) -> str:
    return ", ".join(f"{n} {name}" if n > 1 else name for name, n in fusion.replaced).replace("aten.", "")


def _refusals(found: Explanation, looked: Sequence[str]) -> Table:
    rows = tuple((each.rewrite, each.reason, len(each.modules), _first(each.modules)) for each in found.refused)
    note = "" if rows else f"Nothing that {', '.join(looked)} looked at was refused."
    return Table("Refused", ("rewrite", "because", "sites", "where"), rows, note)


def _first(modules: Sequence[str]) -> str:
    return ", ".join(modules[:3]) + (" ..." if len(modules) > 3 else "")


def _figures(found: Explanation, captured: Graph, compiled: Graph) -> list[Figure]:
    """A block of each kind before and after; boxes of one colour do the same."""
    before, after = groups_of(provenance.regions(captured, compiled))
    figures = []
    kinds = [kind for kind in found.kinds if kind.blocks != ("",)] or found.kinds
    for kind in kinds:
        block = kind.blocks[min(1, len(kind.blocks) - 1)]  # the second has one of its kind before it
        for graph, groups, when in ((captured, before, "captured"), (compiled, after, "compiled")):
            if (drawn := diagram(graph, block, groups)).boxes:
                figures.append(Figure(f"{kind.name}: {block or 'the model'} as {when}", svg(drawn)))
    return figures


def _bytes(count: int) -> str:
    size, unit = (count / 2**30, "GiB") if count >= 2**30 else (count / 2**20, "MiB")
    return f"{size:.4g} {unit}"


def _ratio(a: int, b: int) -> float | None:
    return a / b if b else None
