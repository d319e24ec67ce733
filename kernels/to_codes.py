"""Rows in eight bits with a scale that is known beforehand: what lies beyond it saturates."""

import torch
from torch import Tensor

from horsepower.kernels.float8 import E4M3, codes_of, widen
from horsepower.kernels.registry import Cost, Op, register
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = "(Tensor x, float inverse) -> Tensor"


def outputs(x: Tensor, inverse: float) -> tuple[Tensor, ...]:
    """x [..., C] -> codes of its shape in e4m3: of x times `inverse`. Raises ValueError for another dtype."""
    if not x.is_floating_point() or x.itemsize < 2:
        raise ValueError(f"x: got {x.dtype}, allowed: floats of 16 bits or more")
    return (x.new_empty(x.shape, dtype=E4M3),)


def reference(x: Tensor, inverse: float) -> tuple[Tensor, ...]:
    """Plain PyTorch."""
    wide = widen(x)
    return (codes_of(wide, torch.tensor(inverse, dtype=wide.dtype, device=x.device)),)


def cost(x: Tensor, inverse: float) -> Cost:
    """A product a value; each tensor passes memory once."""
    return Cost(flops=x.numel(), bytes=x.numel() * (x.itemsize + 1))


TO_CODES = register(Op("to_codes", SCHEMA, outputs, reference, cost, kernels=(triton_kernel("to_codes"),)))
