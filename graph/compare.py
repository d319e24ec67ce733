"""How far values are from float64, beside what eager is: the rule by which a rewrite is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Unit in the last place, as the kernels' tests take it: half of it for the 16-bit formats, whose errors are roundings.
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23, torch.float64: 2.0**-52}
FLUSHED = "flushes denormals"


@dataclass(frozen=True)
class Comparison:
    """Errors of one value, as in Check."""

    eager: float
    fused: float
    bound: float
    passed: bool
    note: str = ""

    @property
    def badness(self) -> tuple[bool, bool, float]:
        return not self.passed, bool(self.note), self.fused / self.bound if self.bound else self.fused


def compare(fused: Tensor, eager: Tensor, exact: Tensor, rows: Tensor | None = None) -> Comparison:
    """Over what is finite in eager, or some rows of it; float64 `exact` stands for what has the dtype of `eager`."""
    if fused.shape != eager.shape or fused.dtype != eager.dtype:
        made, wanted = (f"{list(x.shape)} {x.dtype}" for x in (fused, eager))
        return Comparison(0.0, torch.inf, 0.0, False, f"{made} instead of {wanted}")
    if rows is not None:
        fused, eager, exact = (x[rows] for x in (fused, eager, exact))
    if not eager.is_floating_point():
        same = torch.equal(fused, eager)
        return Comparison(0.0, 0.0 if same else torch.inf, 0.0, same, "" if same else "differs from eager")
    finite = eager.isfinite() & exact.isfinite()
    truth = exact[finite]
    off_eager, off_fused = (x[finite].double() - truth for x in (eager, fused))
    error_eager, error_fused = relative(off_eager, truth), relative(off_fused, truth)
    bound = max(1.1 * error_eager, 4 * ULP[eager.dtype])
    if not bool(off_fused.isfinite().all()):
        return Comparison(error_eager, torch.inf, bound, False, "non-finite where eager is not")
    if error_fused <= bound:
        return Comparison(error_eager, error_fused, bound, True)
    visible = off_fused.where(off_fused.abs() >= torch.finfo(eager.dtype).tiny, 0)
    flushed = relative(visible, truth) <= bound
    return Comparison(error_eager, error_fused, bound, flushed, FLUSHED if flushed else "")


def compare_all(fused: Sequence[Any], eager: Sequence[Any], exact: Sequence[Any]) -> tuple[str, Comparison]:
    """The first output that cannot be eager's, by its place, or the floats of all of them."""
    if len(fused) != len(eager):
        return "outputs", Comparison(0.0, torch.inf, 0.0, False, f"{len(fused)} outputs instead of {len(eager)}")
    floats: list[tuple[Tensor, Tensor, Tensor]] = []
    for place, (got, want, right) in enumerate(zip(fused, eager, exact, strict=True)):
        if not isinstance(want, Tensor) or not isinstance(got, Tensor):
            one, other = ("a tensor" if isinstance(x, Tensor) else x for x in (got, want))
            if one != other:
                return f"output {place}", Comparison(0.0, torch.inf, 0.0, False, f"{one} instead of {other}")
        elif (got.shape, got.dtype) == (want.shape, want.dtype) and (want.is_floating_point() or want.is_complex()):
            one, other, true = (
                torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (got, want, right)
            )
            floats.append((one.flatten(), other.flatten(), true.flatten()))
        elif not (found := compare(got, want, right)).passed:
            return f"output {place}", found
    if not floats:
        return "outputs", Comparison(0.0, 0.0, 0.0, True)
    return "outputs", compare(*map(torch.cat, zip(*floats, strict=True)))


def relative(difference: Tensor, truth: Tensor) -> float:
    norm, size = float(difference.norm()), float(truth.norm())
    return norm / size if size else (0.0 if norm == 0 else torch.inf)
