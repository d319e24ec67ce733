"""RMS norm and cast: normed = cast(x * rsqrt(mean(x^2) + eps) * gain), over the last dimension, at least in float32.

Without a gain the norm is all.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from horsepower import _native
from horsepower.kernels.modality import by_modality, check_experts, first_rows
from horsepower.kernels.native_library import FLOATS, ISAS, pitch, refuses, threads
from horsepower.kernels.registry import Cost, Kernel, Op, register
from horsepower.kernels.sizes import differ
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = "(Tensor x, Tensor? gain, int experts, SymInt[] counts, float eps, ScalarType dtype) -> Tensor"


def outputs(
    x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int], eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """x [L, ..., C] -> the same shape in `dtype`. Raises ValueError for inputs that do not belong together."""
    check_experts(experts, counts, x.shape[0])
    if gain is not None and differ(gain.shape, (experts * x.shape[-1],)):
        raise ValueError(f"gain: got {list(gain.shape)}, allowed: [{experts} * {x.shape[-1]}]")
    return (x.new_empty(x.shape, dtype=dtype),)


def reference(
    x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int], eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The same in plain PyTorch; float64 inputs give the exact answer."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))

    def norm(part: Tensor, own: Tensor | None = None) -> Tensor:
        return F.rms_norm(part, (x.shape[-1],), None if own is None else own.to(wide.dtype), eps)

    if gain is None:
        return (norm(wide).to(dtype),)
    return (by_modality(norm, experts, counts, wide, gain).to(dtype),)


def native_supports(
    x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int], eps: float, dtype: torch.dtype
) -> str | None:
    """Why the C++ kernel cannot take these inputs, or None."""
    if pitch(x) is None or (experts != 1 and x.ndim != 2):
        return "its rows are not equally far apart" if experts == 1 else f"x has {x.ndim} dimensions"
    if x.dtype not in FLOATS or dtype not in FLOATS:
        return "neither float32 nor bfloat16"
    if gain is None:
        return refuses(x)
    return "gain is not float32" if gain.dtype != torch.float32 else refuses(x, gain)


def native(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int],
    eps: float, dtype: torch.dtype, isa: str = ISAS[0],
) -> None:  # fmt: skip
    """C++ in the widest instruction set of this CPU; rows may be strided, one row runs on one thread."""
    C = x.shape[-1]
    L = x.numel() // C if C else 0
    second, third = first_rows(experts == 3, counts, L)
    _native.rms_norm(
        isa,
        x.data_ptr(),
        0 if gain is None else gain.data_ptr(),
        out[0].data_ptr(),
        pitch(x) or 0,
        C if experts == 3 else 0,
        L,
        C,
        second,
        third,
        eps,
        x.dtype == torch.bfloat16,
        dtype == torch.bfloat16,
        threads(x.numel()),
    )


def cost(x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int], eps: float, dtype: torch.dtype) -> Cost:
    """Per value: a square and its sum, two products; each tensor passes memory once."""
    n = x.numel()
    gains = 0 if gain is None else gain.numel() * gain.itemsize
    return Cost(flops=4 * n, bytes=n * (x.itemsize + dtype.itemsize) + gains)


RMS_NORM = register(
    Op(
        "rms_norm",
        SCHEMA,
        outputs,
        reference,
        cost,
        kernels=(Kernel("native", native_supports, native), triton_kernel("rms_norm")),
    )
)
