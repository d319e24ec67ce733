"""The clamped activations of the MLP and the cast that follows, computed in float32.

swiglu7, columns interleaved: a = min(u[0::2], 7), b = clamp(u[1::2], -7, 7);  a * sigmoid(1.702 a) * (b + 1)
gelu7:                        z = min(u, 7);                                   z * sigmoid(1.702 z)
"""

import torch
from torch import Tensor

from horsepower import _native
from horsepower.kernels.native_library import ISAS, refuses, threads
from horsepower.kernels.registry import Cost, Kernel, Op, register

SCHEMA = "(Tensor u, str kind, ScalarType dtype) -> Tensor"
KINDS = ("swiglu7", "gelu7")


def outputs(u: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """u [..., 2 I] -> [..., I] for swiglu7, [..., G] -> [..., G] for gelu7. Raises ValueError for what does not fit."""
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, allowed: {', '.join(KINDS)}")
    if kind == "swiglu7" and u.shape[-1] % 2:
        raise ValueError(f"u: got {u.shape[-1]} columns, allowed: an even number")
    return (u.new_empty((*u.shape[:-1], u.shape[-1] // (2 if kind == "swiglu7" else 1)), dtype=dtype),)


def reference(u: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same in plain PyTorch; float64 inputs give the exact answer."""
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    if kind == "gelu7":
        z = u.clamp(max=7)
        return ((z * torch.sigmoid(1.702 * z)).to(dtype),)
    a, b = u[..., 0::2].clamp(max=7), u[..., 1::2].clamp(-7, 7)
    return ((a * torch.sigmoid(1.702 * a) * (b + 1)).to(dtype),)


def native_supports(u: Tensor, kind: str, dtype: torch.dtype) -> str | None:
    """Why the C++ kernel cannot take these inputs, or None."""
    if u.ndim != 2:
        return f"u has {u.ndim} dimensions"
    if any(x not in (torch.float32, torch.bfloat16) for x in (u.dtype, dtype)):
        return "neither float32 nor bfloat16"
    return refuses(u)


def native(
    out: tuple[Tensor, ...], _workspace: None, u: Tensor, kind: str, dtype: torch.dtype, isa: str = ISAS[0]
) -> None:
    """C++ in the widest instruction set of this CPU; rows may be strided, one row runs on one thread."""
    rows, dim = out[0].shape
    _native.activation(
        isa,
        u.data_ptr(),
        out[0].data_ptr(),
        u.stride(0),
        rows,
        dim,
        kind == "swiglu7",
        u.dtype == torch.bfloat16,
        dtype == torch.bfloat16,
        threads(),
    )


def cost(u: Tensor, kind: str, dtype: torch.dtype) -> Cost:
    """An exponential counts as one operation; each tensor passes memory once."""
    made = u.numel() // (2 if kind == "swiglu7" else 1)
    return Cost(flops=made * (10 if kind == "swiglu7" else 6), bytes=u.numel() * u.itemsize + made * dtype.itemsize)


ACTIVATION = register(
    Op("activation", SCHEMA, outputs, reference, cost, kernels=(Kernel("native", native_supports, native),))
)
