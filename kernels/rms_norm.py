"""RMS norm and cast: normed = cast(x * rsqrt(mean(x^2) + eps) * gain), over the last dimension, at least in float32."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from horsepower.kernels.modality import by_modality, check_counts
from horsepower.kernels.registry import Cost, Op, register

SCHEMA = "(Tensor x, Tensor gain, int experts, SymInt[] counts, float eps, ScalarType dtype) -> Tensor"


def outputs(
    x: Tensor, gain: Tensor, experts: int, counts: Sequence[int], eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """x [L, ..., C] -> the same shape in `dtype`. Raises ValueError for inputs that do not belong together."""
    if gain.ndim != 1 or gain.shape[0] != experts * x.shape[-1]:
        raise ValueError(f"gain: got {list(gain.shape)}, allowed: [{experts} * {x.shape[-1]}]")
    if experts != 1:
        check_counts(counts, x.shape[0])
    return (x.new_empty(x.shape, dtype=dtype),)


def reference(
    x: Tensor, gain: Tensor, experts: int, counts: Sequence[int], eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The same in plain PyTorch; float64 inputs give the exact answer."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))

    def norm(part: Tensor, own: Tensor) -> Tensor:
        return F.rms_norm(part, (x.shape[-1],), own.to(wide.dtype), eps)

    return (by_modality(norm, experts, counts, wide, gain).to(dtype),)


def cost(x: Tensor, gain: Tensor, experts: int, counts: Sequence[int], eps: float, dtype: torch.dtype) -> Cost:
    """Per value: a square and its sum, two products; each tensor passes memory once."""
    n = x.numel()
    return Cost(flops=4 * n, bytes=n * (x.itemsize + dtype.itemsize) + gain.numel() * gain.itemsize)


RMS_NORM = register(Op("rms_norm", SCHEMA, outputs, reference, cost, kernels=()))
