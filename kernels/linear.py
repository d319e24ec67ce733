"""Matrix product with a transposed weight; with three experts, each modality's rows with a weight of their own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from horsepower.kernels.modality import by_modality, check_experts
from horsepower.kernels.registry import Cost, Kernel, Op, register
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = "(Tensor x, Tensor weight, int experts, SymInt[] counts) -> Tensor"


def outputs(x: Tensor, weight: Tensor, experts: int, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """x [..., I] and weight [experts * O, I] of one dtype -> [..., O]; with experts, x is [L, I].

    Raises ValueError for inputs that do not belong together.
    """
    if weight.ndim != 2 or weight.dtype != x.dtype or weight.shape[1] != x.shape[-1] or weight.shape[0] % experts:
        raise ValueError(
            f"weight: got {list(weight.shape)} {weight.dtype}, allowed: [{experts} O, {x.shape[-1]}] {x.dtype}"
        )
    check_experts(experts, counts, x.shape[0])
    return (x.new_empty((*x.shape[:-1], weight.shape[0] // experts)),)


def reference(x: Tensor, weight: Tensor, experts: int, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """One product, or one a modality."""
    return (by_modality(F.linear, experts, counts, x, weight),)


def library_supports(x: Tensor, *_: object) -> str | None:
    """Why the library's product cannot write the output in place, or None."""
    return None if x.ndim == 2 else f"x has {x.ndim} dimensions"


def library(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, weight: Tensor, experts: int, counts: Sequence[int]
) -> None:
    """torch's matrix product (oneDNN, cuBLAS) into the output's rows."""
    if experts == 1:
        torch.mm(x, weight.t(), out=out[0])
        return
    rows = list(counts)
    for part, rows_of, own in zip(out[0].split(rows), x.split(rows), weight.chunk(experts), strict=True):
        if rows_of.shape[0]:
            torch.mm(rows_of, own.t(), out=part)


def cost(x: Tensor, weight: Tensor, experts: int, counts: Sequence[int]) -> Cost:
    """A multiplication and an addition for each pair; each tensor passes memory once."""
    width = weight.shape[0] // experts
    rows = x.numel() // x.shape[-1]
    moved = x.numel() + weight.numel() + rows * width
    return Cost(flops=2 * x.numel() * width, bytes=moved * x.itemsize)


LINEAR = register(
    Op(
        "linear",
        SCHEMA,
        outputs,
        reference,
        cost,
        kernels=(Kernel("library", library_supports, library, devices=("cpu", "cuda")), triton_kernel("linear")),
    )
)
