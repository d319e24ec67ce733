"""`horsepower verify`: every rewrite of a plan against float64, as one report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from horsepower.bench import step
from horsepower.bench.measure import machine
from horsepower.bench.report import Cell, Paragraph, Part, Report, Table
from horsepower.bench.step import Tokens
from horsepower.graph import provenance
from horsepower.graph.capture import capture
from horsepower.graph.passes import PASSES, Pass
from horsepower.graph.plan import plan_of
from horsepower.graph.verify import Check, check_distances, check_sites, check_whole
from horsepower.kernels.target import target_of
from horsepower.quant.scheme import Scheme
from horsepower.runtime.compiled import device_of, planned_scheme
from horsepower.runtime.executor import Executor, weights_of
from horsepower.runtime.fused import VELOCITY_SHAPES, velocity_example

WHOLE = 2048  # tokens of the model end to end in float64: some ten seconds


def verify(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    inputs: tuple[Any, ...] | None = None,
    whole_inputs: tuple[Any, ...] | None = None,
    example_keywords: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    method: str = "forward",
    only: Sequence[Pass] = PASSES,
    scheme: str | Scheme | None = None,
) -> tuple[Check, ...]:
    """Compile `module.method` as `horsepower.compile` does and check each distinct rewrite, then the plan end to end.

    inputs: positional arguments at the sizes to verify, where the module lies, followed by the values of
    `example_keywords`, if any; None for the examples. whole_inputs: the same for the check end to end, where `inputs`
    would take too long.
    The other arguments are those of `horsepower.compile`. Under a scheme kernels are checked against plain operators on
    the same codes, and then how far each site and each output is from the module without codes.
    Raises CaptureError for code that cannot be one graph, ValueError for inputs that the plan does not take, and for a
    scheme that the device cannot compute.
    """
    target = target_of(device_of(module, example_inputs))
    chosen = planned_scheme(scheme, target)
    captured = capture(module, example_inputs, example_keywords, dynamic_shapes, method)
    captured.target = target
    compiled = replace(provenance.snapshot(captured), scheme=chosen)
    changed = provenance.rewrite(compiled, only)
    weights, keywords = weights_of(module), dict(example_keywords or {})
    run = Executor(plan_of(compiled), weights)
    given = inputs or example_inputs
    flat, _ = run.plan.contract.check(given, keywords)
    checks = check_sites(captured, compiled, changed, weights, flat)
    if whole_inputs is not None:
        flat, _ = run.plan.contract.check(whole_inputs, keywords)
        given = whole_inputs

    def whole(*_: Any) -> Any:
        return run(*given, **keywords)

    if chosen is not None:
        checks += check_distances(captured, whole, weights, flat, chosen.name)
    return (*checks, check_whole(captured if chosen is None else compiled, whole, weights, flat))


def verify_preset(
    variant: str, tokens: Tokens, device: str = "cpu", scheme: str | None = None
) -> tuple[tuple[Check, ...], Report, Report]:
    """Checks of a step of the built-in preset on a device; they in short for a terminal, and in full."""
    model, whole = step.preset(variant, device), tokens.scaled(WHOLE)
    checks = verify(
        model,
        velocity_example(model),
        step.inputs(model, tokens),
        step.inputs(model, whole),
        dynamic_shapes=VELOCITY_SHAPES,
        method="velocity",
        scheme=scheme,
    )
    what = variant if scheme is None else f"{variant}, {scheme}"
    title = f"foal {what}: every rewrite against float64, at {tokens} tokens in {tokens.frames} frames"
    where = machine(device)
    return checks, report(title, where, checks, whole), report(title, where, checks, whole, full=True)


def report(title: str, where: str, checks: Sequence[Check], whole: Tokens | None = None, full: bool = False) -> Report:
    """A row a site; then whatever failed, or, in full, every check. whole: tokens of the check end to end."""
    sites: dict[int, list[Check]] = {}
    for check in checks:
        if check.site is not None and not check.scheme:
            sites.setdefault(check.site, []).append(check)
    failed = [check for check in checks if not check.passed]
    verdict = f"{len(failed)} of {len(checks)} checks FAILED" if failed else f"all {len(checks)} checks passed"
    places = sum(each[0].count for each in sites.values())
    kinds = len({check.inputs for check in checks if check.site is not None})
    parts: list[Part] = [
        Paragraph(f"{verdict}: {places} rewritten places, {len(sites)} of them distinct, on {kinds} kinds of inputs."),
        Table("Sites", COLUMNS, tuple(map(_row, sites.values())), RULE),
    ]
    if rows := {check.rows for check in checks if check.rows is not None}:
        some = f"{min(rows)} to {max(rows)}" if len(rows) > 1 else f"{min(rows)}"
        edges = "the first and last of each modality and frame among them"
        parts.append(Paragraph(f"Attention ran over all rows, and {some} were compared with float64, {edges}."))
    for end in (check for check in checks if check.site is None and not check.scheme):
        errors = f"error(eager) {end.error_eager:.3g}, error(fused) {end.error_fused:.3g}, bound {end.bound:.3g}"
        parts.append(Paragraph(f"End to end{f' at {whole} tokens' if whole else ''}: {errors}: {_verdict([end])}"))
    if distances := [check for check in checks if check.scheme]:
        shortly = f"Distance of {distances[0].scheme} from 16 bits"
        parts.append(Table(shortly, DISTANCE_COLUMNS, tuple(map(_distance_row, distances)), BUDGETS))
    shown = checks if full else failed
    if shown:
        parts.append(Table("Every check" if full else "Failed", ALL_COLUMNS, tuple(map(_full_row, shown))))
    return Report(title, where, tuple(parts))


COLUMNS = (
    "rewrite", "first site", "sites", "eager", "fused", "worst inputs", "worst eager", "worst fused", "bound",
    "verdict",
)  # fmt: skip
ALL_COLUMNS = (
    "rewrite", "first site", "sites", "kernels", "inputs", "value", "error(eager)", "error(fused)", "bound", "rows",
    "passed", "note",
)  # fmt: skip
RULE = (
    "Errors are relative L2 against float64: on the model's own values, then on the worst of random and hostile ones.\n"
    "The rule: error(fused) <= max(1.1 error(eager), 4 ulp), and non-finite only where eager is."
)
DISTANCE_COLUMNS = ("of", "sites", "value", "16 bits", "scheme", "budget", "verdict")
BUDGETS = (
    "Both against float64 without codes, relative L2: of products on the model's own values, and of a step's outputs.\n"
    "Above, kernels that read codes are held against plain operators that read the same codes."
)


def _distance_row(check: Check) -> tuple[Cell, ...]:
    place = "a step" if check.site is None else check.module or "(model)"
    errors = map(_finite, (check.error_eager, check.error_fused, check.bound))
    return place, check.count, check.value, *errors, _verdict([check])


def _row(checks: Sequence[Check]) -> tuple[Cell, ...]:
    """A site; inputs on which eager has no right digit are its worst only if it fails there."""
    own, worst = checks[0], max(checks, key=lambda c: (not c.passed, c.error_eager < 0.5, c.severity))
    errors = (worst.error_eager, worst.error_fused, worst.bound)
    place = own.module or "(model)"
    return (
        own.rewrite, place, own.count, _finite(own.error_eager), _finite(own.error_fused), worst.inputs,
        *map(_finite, errors), _verdict(checks),
    )  # fmt: skip


def _full_row(check: Check) -> tuple[Cell, ...]:
    return (
        check.rewrite, check.module or "(model)", check.count, ", ".join(check.kernels), check.inputs, check.value,
        *map(_finite, (check.error_eager, check.error_fused, check.bound)), check.rows, check.passed, check.note,
    )  # fmt: skip


def _finite(error: float) -> float | None:
    """JSON has no infinity; the note says why there is no error."""
    return error if math.isfinite(error) else None


def _verdict(checks: Sequence[Check]) -> str:
    broken = [check for check in checks if not check.passed]
    notes = {check.note for check in checks if check.note} if not broken else {check.inputs for check in broken}
    return ", ".join(("FAILED" if broken else "passed", *sorted(notes)))
