"""Rotary position embedding of half-split pairs: the first 2 h dimensions of each head turn, the others stay.

(a, b) -> (a cos - b sin, b cos + a sin)   with a = x[..., :h], b = x[..., h : 2 h]
"""

import torch
from torch import Tensor

from horsepower.kernels.registry import Cost, Op, register
from horsepower.kernels.sizes import differ

SCHEMA = "(Tensor x, Tensor rope, ScalarType dtype) -> Tensor"


def outputs(x: Tensor, rope: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x [L, H, D], rope [L, 2 h] (sines, then cosines) -> [L, H, D] in `dtype`.

    Raises ValueError for inputs that do not belong together.
    """
    check_rope(rope, x.shape[0], x.shape[2])
    return (x.new_empty(x.shape, dtype=dtype),)


def check_rope(rope: Tensor, rows: int, head_dim: int) -> None:
    """Raises ValueError unless rope is [rows, 2 h] with 2 h <= head_dim."""
    if rope.ndim != 2 or differ(rope.shape[:1], (rows,)) or rope.shape[1] % 2 or rope.shape[1] > head_dim:
        raise ValueError(f"rope: got {list(rope.shape)}, allowed: [{rows}, an even number up to {head_dim}]")


def rotate(x: Tensor, rope: Tensor, paired: bool = False) -> Tensor:
    """Plain PyTorch, in the dtype of x and rope. Paired: a = x[..., 0 : 2 h : 2], b = x[..., 1 : 2 h : 2]."""
    sin, cos = rope[:, None].chunk(2, dim=-1)
    turned, rest = x.split((rope.shape[1], x.shape[-1] - rope.shape[1]), dim=-1)
    a, b = turned.unflatten(-1, (rope.shape[1] // 2, 2)).unbind(-1) if paired else turned.chunk(2, dim=-1)
    both = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat((torch.stack(both, dim=-1).flatten(-2) if paired else torch.cat(both, dim=-1), rest), dim=-1)


def paired_order(head_dim: int, turned: int) -> list[int]:
    """Where the dimensions of a paired head come from: those that turn together, j and j + turned / 2, side by side.

    Raises ValueError unless `turned` is even and at most head_dim.
    """
    if turned % 2 or not 0 <= turned <= head_dim:
        raise ValueError(f"turned: got {turned}, allowed: an even number up to {head_dim}")
    half = turned // 2
    return [each for j in range(half) for each in (j, j + half)] + list(range(turned, head_dim))


def reference(x: Tensor, rope: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same in plain PyTorch."""
    return (rotate(x, rope).to(dtype),)


def cost(x: Tensor, rope: Tensor, dtype: torch.dtype) -> Cost:
    """Three operations a turned value; each tensor passes memory once."""
    turned = rope.numel() * x.shape[1]
    return Cost(flops=3 * turned, bytes=x.numel() * (x.itemsize + dtype.itemsize) + rope.numel() * rope.itemsize)


ROPE = register(Op("rope", SCHEMA, outputs, reference, cost))
