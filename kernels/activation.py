"""Activations of the MLP and the cast that follows, computed in float32.

swiglu7, columns interleaved: a = min(u[0::2], 7), b = clamp(u[1::2], -7, 7);  a * sigmoid(1.702 a) * (b + 1)
gelu7:                        z = min(u, 7);                                   z * sigmoid(1.702 z)
gelu, gelu_tanh, silu: as torch's of that name.

The first two are bounded, so that eight bits hold them times a constant: swiglu7 in [-42, 56], gelu7 up to 7.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from horsepower import _native
from horsepower.kernels.float8 import E4M3, codes_of, widen
from horsepower.kernels.native_library import FLOATS, ISAS, pitch, refuses, threads
from horsepower.kernels.registry import Cost, Kernel, Op, register
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = "(Tensor u, str kind, ScalarType dtype) -> Tensor"
KINDS = ("swiglu7", "gelu7", "gelu", "gelu_tanh", "silu")  # as the C++ numbers them
FP8_GAINS = {"swiglu7": 8.0, "gelu7": 64.0}  # 448 / 56; 448 / 7

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def outputs(u: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """u [..., 2 I] -> [..., I] for swiglu7, [..., G] -> [..., G] for the others.

    In float8_e4m3fn the results are codes of the value times FP8_GAINS. Raises ValueError for what does not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, allowed: {', '.join(KINDS)}")
    if kind == "swiglu7" and u.shape[-1] % 2:
        raise ValueError(f"u: got {u.shape[-1]} columns, allowed: an even number")
    if dtype == E4M3 and kind not in FP8_GAINS:
        raise ValueError(f"dtype: got {dtype} for {kind}, allowed: for {', '.join(FP8_GAINS)}, which are bounded")
    return (u.new_empty((*u.shape[:-1], u.shape[-1] // (2 if kind == "swiglu7" else 1)), dtype=dtype),)


def reference(u: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same in plain PyTorch; float64 inputs give the exact answer."""
    y = _activated(widen(u), kind)
    return (codes_of(y, FP8_GAINS[kind]) if dtype == E4M3 else y.to(dtype),)


def _activated(u: Tensor, kind: str) -> Tensor:
    if kind in PLAIN:
        return PLAIN[kind](u)
    if kind == "gelu7":
        z = u.clamp(max=7)
        return z * torch.sigmoid(1.702 * z)
    a, b = u[..., 0::2].clamp(max=7), u[..., 1::2].clamp(-7, 7)
    return a * torch.sigmoid(1.702 * a) * (b + 1)


def native_supports(u: Tensor, kind: str, dtype: torch.dtype) -> str | None:
    """Why the C++ kernel cannot take these inputs, or None."""
    if pitch(u) is None:
        return "its rows are not equally far apart"
    if u.dtype not in FLOATS or dtype not in FLOATS:
        return "neither float32 nor bfloat16"
    return refuses(u)


def native(
    out: tuple[Tensor, ...], _workspace: None, u: Tensor, kind: str, dtype: torch.dtype, isa: str = ISAS[0]
) -> None:
    """C++ in the widest instruction set of this CPU; rows may be strided, one row runs on one thread."""
    dim = out[0].shape[-1]
    _native.activation(
        isa,
        u.data_ptr(),
        out[0].data_ptr(),
        pitch(u) or 0,
        out[0].numel() // dim if dim else 0,
        dim,
        KINDS.index(kind),
        u.dtype == torch.bfloat16,
        dtype == torch.bfloat16,
        threads(u.numel()),
    )


def cost(u: Tensor, kind: str, dtype: torch.dtype) -> Cost:
    """An exponential counts as one operation; each tensor passes memory once."""
    made = u.numel() // (2 if kind == "swiglu7" else 1)
    return Cost(flops=made * (10 if kind == "swiglu7" else 6), bytes=u.numel() * u.itemsize + made * dtype.itemsize)


ACTIVATION = register(
    Op(
        "activation",
        SCHEMA,
        outputs,
        reference,
        cost,
        kernels=(Kernel("native", native_supports, native), triton_kernel("activation")),
    )
)
