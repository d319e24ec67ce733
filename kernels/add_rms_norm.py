"""Residual addition, RMS norm and cast in one pass: how a branch ends and the next one begins.

    sum = residual + branch;  normed = cast(sum * rsqrt(mean(sum^2) + eps) * (gain + 1))

Rows are tokens. With three experts the gain is one row a modality, and `counts` says how many tokens each has.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from horsepower import _native
from horsepower.kernels.native_library import ISAS, threads
from horsepower.kernels.registry import Cost, Kernel, Op, register

SCHEMA = (
    "(Tensor residual, Tensor branch, Tensor gain, SymInt[] counts, float eps, ScalarType dtype) -> (Tensor, Tensor)"
)


def outputs(
    residual: Tensor, branch: Tensor, gain: Tensor, counts: Sequence[int], eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """sum [L, C] float32 and normed [L, C] in `dtype`. Raises ValueError for inputs that do not belong together."""
    if residual.ndim != 2 or residual.dtype != torch.float32:
        raise ValueError(f"residual: got {list(residual.shape)} {residual.dtype}, allowed: [L, C] float32")
    if branch.shape != residual.shape or branch.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"branch: got {list(branch.shape)} {branch.dtype}, allowed: {list(residual.shape)} float32 or bfloat16"
        )
    if gain.ndim != 1 or gain.dtype != torch.float32 or gain.shape[0] not in (C := residual.shape[1], 3 * C):
        raise ValueError(f"gain: got {list(gain.shape)} {gain.dtype}, allowed: [C] or [3 C] float32 with C = {C}")
    if gain.shape[0] == 3 * C and (len(counts) != 3 or sum(counts) != residual.shape[0]):
        raise ValueError(f"counts: got {list(counts)}, allowed: three that sum to {residual.shape[0]}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: got {dtype}, allowed: torch.float32, torch.bfloat16")
    shape = residual.shape
    return residual.new_empty(shape), residual.new_empty(shape, dtype=dtype)


def reference(
    residual: Tensor, branch: Tensor, gain: Tensor, counts: Sequence[int], eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch; float64 inputs give the exact answer."""
    C = residual.shape[1]
    total = residual + branch
    experts = gain.numel() // C
    parts = total.split(list(counts)) if experts == 3 else (total,)
    normed = [F.rms_norm(part, (C,), g + 1, eps) for part, g in zip(parts, gain.chunk(experts), strict=True)]
    return total, torch.cat(normed).to(dtype)


def native_supports(residual: Tensor, branch: Tensor, gain: Tensor, *_: object) -> str | None:
    """Why the C++ kernel cannot take these inputs, or None."""
    if any(x.device.type != "cpu" for x in (residual, branch, gain)):
        return "not on the CPU"
    if residual.stride(1) != 1 or branch.stride(1) != 1 or gain.stride(0) != 1:
        return "the last dimension is not contiguous"
    return None


def native(
    out: tuple[Tensor, Tensor],
    residual: Tensor,
    branch: Tensor,
    gain: Tensor,
    counts: Sequence[int],
    eps: float,
    dtype: torch.dtype,
    isa: str = ISAS[0],
) -> None:
    """C++ in the widest instruction set of this CPU; rows may be strided, one row runs on one thread."""
    total, normed = out
    L, C = residual.shape
    second, third = (counts[0], counts[0] + counts[1]) if gain.numel() == 3 * C else (L, L)
    _native.add_rms_norm(
        isa,
        residual.data_ptr(),
        branch.data_ptr(),
        gain.data_ptr(),
        total.data_ptr(),
        normed.data_ptr(),
        residual.stride(0),
        branch.stride(0),
        L,
        C,
        second,
        third,
        eps,
        branch.dtype == torch.bfloat16,
        dtype == torch.bfloat16,
        threads(),
    )


def cost(residual: Tensor, branch: Tensor, gain: Tensor, counts: Sequence[int], eps: float, dtype: torch.dtype) -> Cost:
    """Per value: an addition, a square and its sum, two products; each tensor passes memory once."""
    n = residual.numel()
    moved = n * (residual.itemsize * 2 + branch.itemsize + dtype.itemsize) + gain.numel() * gain.itemsize
    return Cost(flops=5 * n, bytes=moved)


ADD_RMS_NORM = register(
    Op("add_rms_norm", SCHEMA, outputs, reference, cost, kernels=(Kernel("native", native_supports, native),))
)
