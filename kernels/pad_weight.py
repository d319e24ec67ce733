"""Weight recipe, for scales too: zeros below and to the right of each expert's part of a weight."""

import torch.nn.functional as F
from torch import Tensor

from horsepower.kernels.float8 import bits
from horsepower.kernels.registry import Cost, Op, register

SCHEMA = "(Tensor weight, int experts, int rows, int columns) -> Tensor"


def outputs(weight: Tensor, experts: int, rows: int, columns: int) -> tuple[Tensor, ...]:
    """weight [experts * O, I] -> [experts * (O + rows), I + columns]. Raises ValueError for another shape."""
    if weight.ndim != 2 or experts < 1 or weight.shape[0] % experts:
        raise ValueError(f"weight: got {list(weight.shape)}, allowed: [{experts} O, I]")
    return (weight.new_empty((weight.shape[0] + experts * rows, weight.shape[1] + columns)),)


def reference(weight: Tensor, experts: int, rows: int, columns: int) -> tuple[Tensor, ...]:
    """Plain PyTorch."""
    own = bits(weight).unflatten(0, (experts, -1))
    return (F.pad(own, (0, columns, 0, rows)).flatten(0, 1).view(weight.dtype),)


def cost(weight: Tensor, experts: int, rows: int, columns: int) -> Cost:
    """No arithmetic."""
    (padded,) = outputs(weight, experts, rows, columns)
    return Cost(flops=0, bytes=(weight.numel() + padded.numel()) * weight.itemsize)


PAD_WEIGHT = register(Op("pad_weight", SCHEMA, outputs, reference, cost))
