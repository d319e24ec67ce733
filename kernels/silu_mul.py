"""The gated SiLU of two projections, or of two halves of one, and the cast that follows: silu(gate) * up in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from horsepower import _native
from horsepower.kernels.native_library import FLOATS, ISAS, pitch, refuses, threads
from horsepower.kernels.registry import Cost, Kernel, Op, register
from horsepower.kernels.sizes import differ
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = "(Tensor gate, Tensor up, ScalarType dtype) -> Tensor"


def outputs(gate: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """gate and up [..., I] of one dtype -> [..., I] in `dtype`. Raises ValueError for what does not fit."""
    if differ(up.shape, gate.shape) or up.dtype != gate.dtype:
        raise ValueError(f"up: got {list(up.shape)} {up.dtype}, allowed: {list(gate.shape)} {gate.dtype}, as gate")
    return (gate.new_empty(gate.shape, dtype=dtype),)


def reference(gate: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same in plain PyTorch; float64 inputs give the exact answer."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return ((F.silu(gate.to(wide)) * up.to(wide)).to(dtype),)


def native_supports(gate: Tensor, up: Tensor, dtype: torch.dtype) -> str | None:
    """Why the C++ kernel cannot take these inputs, or None."""
    if pitch(gate) is None or pitch(up) is None:
        return "their rows are not equally far apart"
    if gate.dtype not in FLOATS or dtype not in FLOATS:
        return "neither float32 nor bfloat16"
    return refuses(gate, up)


def native(
    out: tuple[Tensor, ...], _workspace: None, gate: Tensor, up: Tensor, dtype: torch.dtype, isa: str = ISAS[0]
) -> None:
    """C++ in the widest instruction set of this CPU; rows may be strided, one row runs on one thread."""
    dim = gate.shape[-1]
    _native.silu_mul(
        isa,
        gate.data_ptr(),
        up.data_ptr(),
        out[0].data_ptr(),
        pitch(gate) or 0,
        pitch(up) or 0,
        gate.numel() // dim if dim else 0,
        dim,
        gate.dtype == torch.bfloat16,
        dtype == torch.bfloat16,
        threads(2 * gate.numel()),
    )


def cost(gate: Tensor, up: Tensor, dtype: torch.dtype) -> Cost:
    """An exponential counts as one operation; each tensor passes memory once."""
    n = gate.numel()
    return Cost(flops=5 * n, bytes=n * (2 * gate.itemsize + dtype.itemsize))


SILU_MUL = register(
    Op(
        "silu_mul",
        SCHEMA,
        outputs,
        reference,
        cost,
        kernels=(Kernel("native", native_supports, native), triton_kernel("silu_mul")),
    )
)
