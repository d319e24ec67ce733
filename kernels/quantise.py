"""Rows of any floats in eight bits: each row's largest value becomes 448. See `float8`."""

import torch
from torch import Tensor

from horsepower.kernels.float8 import E4M3, LARGEST, LEAST, codes_of, widen
from horsepower.kernels.registry import Cost, Op, register
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = "(Tensor x) -> (Tensor, Tensor)"


def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, C] -> codes [R, C] in e4m3, scales [R, 1] in float32, or float64 for its values.

    Raises ValueError for another shape or dtype.
    """
    if x.ndim != 2 or not x.is_floating_point() or x.itemsize < 2:
        raise ValueError(f"x: got {list(x.shape)} {x.dtype}, allowed: [R, C] of 16 bits or more")
    scale = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty((x.shape[0], 1), dtype=scale)


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch. NaN makes its whole row NaN, scale and codes; an infinity its scale infinite and its code NaN."""
    wide = widen(x)
    largest = wide.abs().amax(1, keepdim=True) if x.shape[1] else wide.new_zeros(x.shape[0], 1)
    largest = largest.clamp(min=LEAST)
    inverse = torch.full_like(largest, LARGEST) / largest  # a number over a tensor is a product with its reciprocal
    return codes_of(wide, inverse), largest / LARGEST


def cost(x: Tensor) -> Cost:
    """A comparison and a product a value; each tensor passes memory once."""
    return Cost(flops=2 * x.numel(), bytes=x.numel() * (x.itemsize + 1) + 4 * x.shape[0])


QUANTISE = register(Op("quantise", SCHEMA, outputs, reference, cost, kernels=(triton_kernel("quantise"),)))
