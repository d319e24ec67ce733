"""Values of attention in eight bits, each channel's tokens side by side, as the matrix units of eight bits read them.

Their scale is known beforehand: what lies beyond it saturates.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from horsepower.kernels.float8 import E4M3, codes_of, widen
from horsepower.kernels.registry import Cost, Op, register
from horsepower.kernels.sizes import differ
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = "(Tensor x, Tensor inverse) -> Tensor"
MULTIPLE = 16  # tokens: rows of codes begin at multiples of 16 bytes


def turned(shape: Iterable[int]) -> tuple[int, int, int]:
    """The shape of what becomes of [L, H, D]."""
    L, H, D = shape
    return H, D, (L + MULTIPLE - 1) // MULTIPLE * MULTIPLE


def outputs(x: Tensor, inverse: Tensor) -> tuple[Tensor, ...]:
    """x [L, H, D] -> codes [H, D, L up to a multiple of 16] in e4m3, of x times `inverse`, float32 [1]; zeros behind L.

    Raises ValueError for another rank, dtype or `inverse`.
    """
    if x.ndim != 3 or not x.is_floating_point() or x.itemsize < 2:
        raise ValueError(f"x: got {list(x.shape)} {x.dtype}, allowed: [L, H, D], floats of 16 bits or more")
    if differ(inverse.shape, (1,)) or inverse.dtype != torch.float32:
        raise ValueError(f"inverse: got {list(inverse.shape)} {inverse.dtype}, allowed: [1] torch.float32")
    return (x.new_empty(turned(x.shape), dtype=E4M3),)


def reference(x: Tensor, inverse: Tensor) -> tuple[Tensor, ...]:
    """Plain PyTorch."""
    codes = F.pad(widen(x).permute(1, 2, 0), (0, -x.shape[0] % MULTIPLE))
    return (codes_of(codes, inverse).contiguous(),)


def cost(x: Tensor, inverse: Tensor) -> Cost:
    """A product a value; each tensor passes memory once."""
    return Cost(flops=x.numel(), bytes=x.numel() * (x.itemsize + 1))


TRANSPOSE_TO_CODES = register(
    Op("transpose_to_codes", SCHEMA, outputs, reference, cost, kernels=(triton_kernel("transpose_to_codes"),))
)
