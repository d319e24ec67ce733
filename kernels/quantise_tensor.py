"""Tensors in eight bits with one scale each, or one for each expert's part: a weight by its largest value."""

import torch
from torch import Tensor

from horsepower.kernels.quantise import outputs as row_outputs
from horsepower.kernels.quantise import reference as quantise
from horsepower.kernels.registry import Cost, Op, register

SCHEMA = "(Tensor x, int experts) -> (Tensor, Tensor)"


def outputs(x: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """x [experts * R, C] -> codes of its shape in e4m3, scales [experts, 1] in float32.

    Raises ValueError for another shape or dtype.
    """
    codes, _ = row_outputs(x)
    if experts < 1 or x.shape[0] % experts:
        raise ValueError(f"x: got {list(x.shape)}, allowed: [{experts} R, C]")
    return codes, x.new_empty((experts, 1), dtype=torch.float32)


def reference(x: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Each expert's part as one long row."""
    codes, scales = quantise(x.reshape(experts, -1))
    return codes.view(x.shape), scales


def cost(x: Tensor, experts: int) -> Cost:
    """A comparison and a product a value; each tensor passes memory once."""
    return Cost(flops=2 * x.numel(), bytes=x.numel() * (x.itemsize + 1) + 4 * experts)


QUANTISE_TENSOR = register(Op("quantise_tensor", SCHEMA, outputs, reference, cost))
