"""Layer norm over the last dimension and cast: cast((x - mean) / sqrt(variance + eps) * weight + bias) in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from horsepower import _native
from horsepower.kernels.native_library import FLOATS, ISAS, pitch, refuses, threads
from horsepower.kernels.registry import Cost, Kernel, Op, register
from horsepower.kernels.sizes import differ
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = "(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) -> Tensor"


def outputs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """x [..., C], weight and bias [C] -> the shape of x in `dtype`. Raises ValueError for what does not fit."""
    for name, own in (("weight", weight), ("bias", bias)):
        if own is not None and differ(own.shape, x.shape[-1:]):
            raise ValueError(f"{name}: got {list(own.shape)}, allowed: [{x.shape[-1]}]")
    if weight is None and bias is not None:
        raise ValueError("bias: got one without a weight, allowed: both, the weight alone, or none")
    return (x.new_empty(x.shape, dtype=dtype),)


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The same in plain PyTorch; float64 inputs give the exact answer."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    own, shift = (None if each is None else each.to(wide.dtype) for each in (weight, bias))
    return (F.layer_norm(wide, x.shape[-1:], own, shift, eps).to(dtype),)


def native_supports(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> str | None:
    """Why the C++ kernel cannot take these inputs, or None."""
    if pitch(x) is None:
        return "its rows are not equally far apart"
    if x.dtype not in FLOATS or dtype not in FLOATS:
        return "neither float32 nor bfloat16"
    own = [each for each in (weight, bias) if each is not None]
    if any(each.dtype != torch.float32 for each in own):
        return "weight or bias is not float32"
    return refuses(x, *own)


def native(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    dtype: torch.dtype, isa: str = ISAS[0],
) -> None:  # fmt: skip
    """C++ in the widest instruction set of this CPU; rows may be strided, one row runs on one thread."""
    dim = x.shape[-1]
    _native.layer_norm(
        isa,
        x.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out[0].data_ptr(),
        pitch(x) or 0,
        x.numel() // dim if dim else 0,
        dim,
        eps,
        x.dtype == torch.bfloat16,
        dtype == torch.bfloat16,
        threads(x.numel()),
    )


def cost(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Cost:
    """Per value: two sums, a difference, a square, two products and an addition; each tensor passes memory once."""
    n = x.numel()
    own = sum(each.numel() * each.itemsize for each in (weight, bias) if each is not None)
    return Cost(flops=7 * n, bytes=n * (x.itemsize + dtype.itemsize) + own)


LAYER_NORM = register(
    Op(
        "layer_norm",
        SCHEMA,
        outputs,
        reference,
        cost,
        kernels=(Kernel("native", native_supports, native), triton_kernel("layer_norm")),
    )
)
