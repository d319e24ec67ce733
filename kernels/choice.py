"""Which way an operator is computed on a GPU, and why: by what was measured, else by what the roofline predicts.

All candidates take one layout of the weights, so that the choice may change with the length of the prompt. One does
not: whether an operator is computed whole or as its parts is decided when a plan is made, which holds for all lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from horsepower.kernels.rates import GPU, OF_TARGET, Unit, unit_of_attention, unit_of_product
from horsepower.kernels.registry import Op, parts_of
from horsepower.kernels.tables import PARTS, Candidate, Point, configs, form_of, measured

TOKENS = 4096  # where a plan decides what it computes whole: a clip of 256p and 5 seconds has as many


@dataclass(frozen=True)
class Choice:
    candidate: Candidate
    source: Literal["measured", "predicted"]
    why: str

    @property
    def parts(self) -> bool:
        """Whether the operator is to be computed as its parts."""
        return self.candidate.kernel == PARTS

    def __str__(self) -> str:
        return f"{self.source}: {self.why}"


@dataclass(frozen=True)
class Work:
    """What a launch does, as `Rates` take it."""

    unit: Unit
    flops: float
    bytes: int


def candidates(op: Op, arch: str, inputs: Sequence[Any] | None = None) -> tuple[Candidate, ...]:
    """Every way to compute an operator on a GPU of this architecture, in the order in which they are predicted.

    inputs: for those of their form only, see `tables.form_of`.
    """
    form = None if inputs is None else form_of(inputs)
    found: list[Candidate] = []
    for kernel in op.kernels:
        if kernel.name == "triton":
            found += [Candidate("triton", config) for config in configs(op.name, arch, form)]
        elif "cuda" in kernel.devices:
            found.append(Candidate(kernel.name))
    return (*found, Candidate(PARTS)) if op.expand and found else tuple(found)


def choose(op: Op, inputs: Sequence[Any], target: str, whole: bool = False) -> Choice | None:
    """How an operator with a kernel for GPUs is computed on `target`; None if it has none that takes these inputs.

    inputs: in the order of the schema, tensors on the meta device. whole: not as its parts, as in a plan that is made.
    Raises ValueError for a table that cannot be used.
    """
    kernels = [each.name for each in op.kernels if "cuda" in each.devices]
    if (point := measured(op, inputs, target)) and (best := point.best(*(kernels if whole else ()))):
        return Choice(best.candidate, "measured", f"{_figures(point)} at {point.tokens} tokens")
    kernel = op.kernel(*inputs)
    if kernel is None:
        return None
    config = next(iter(configs(op.name, target, form_of(inputs))), None) if kernel.name == "triton" else None
    if kernel.name == "triton" and config is None:  # codes on sm_80
        return None
    if op.expand is None:
        why = f"the first that is there of {', '.join(kernels)}" if len(kernels) > 1 else "the only kernel"
        return Choice(Candidate(kernel.name, config), "predicted", why)
    parts, fused = (predicted(op, inputs, target, name) for name in (PARTS, kernel.name))
    candidate = Candidate(PARTS) if parts < fused and not whole else Candidate(kernel.name, config)
    return Choice(candidate, "predicted", f"parts {1e3 * parts:.3g} ms, fused {1e3 * fused:.3g} ms")


def predicted(op: Op, inputs: Sequence[Any], target: str, kernel: str) -> float:
    """Seconds of an operator by one of its kernels, or as its parts, at the rates that are reached.

    inputs: as of `choose`.
    """
    gpu = OF_TARGET[target]
    parts = parts_of(op.expand, inputs) if op.expand else [(op, inputs)]
    if op.expand is None or kernel == PARTS:
        names = [kernel if op.expand is None else _kernel(*part) for part in parts]
        return sum(gpu.reached.seconds(_work(gpu, *part, name)) for part, name in zip(parts, names, strict=True))
    works = [_work(gpu, *part, kernel) for part in parts]
    products = [work for work in works if work.unit in ("matrix", "fp8")]
    moved = sum(x.nbytes for x in (*inputs, *op.outputs(*inputs)) if isinstance(x, Tensor))
    again = max((each.rereads(*inputs) for each in op.kernels if each.name == kernel and each.rereads), default=0)
    unit = products[0].unit if products else "vector"
    whole = Work(unit, sum(work.flops for work in products), moved)
    return gpu.reached.seconds(whole) + again / gpu.reached.memory


def _kernel(op: Op, inputs: Sequence[Any]) -> str:
    found = op.kernel(*inputs)
    return "" if found is None else found.name


def _work(gpu: GPU, op: Op, inputs: Sequence[Any], kernel: str) -> Work:
    """What a kernel does; arithmetic of which Triton reaches a share counts for as much more."""
    cost = op.cost(*inputs)
    unit: Unit = "vector"
    if op.name == "linear":
        unit = unit_of_product(inputs[0].dtype)
    elif op.name == "attention":
        unit = unit_of_attention(inputs[0].dtype)
    shares: dict[Unit, float] = {
        "matrix": gpu.triton, "attention": gpu.triton_attention, "attention_fp8": gpu.triton_attention
    }  # fmt: skip
    return Work(unit, cost.flops / (shares.get(unit, 1) if kernel == "triton" else 1), cost.bytes)


def _figures(point: Point) -> str:
    """The fastest candidate of each kernel."""
    names = dict.fromkeys(timed.candidate.kernel for timed in point.timed)
    best = [found for name in names if (found := point.best(name))]
    return ", ".join(f"{each.candidate.kernel} {1e-3 * each.median:.3g} ms" for each in best)
