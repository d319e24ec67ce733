"""Weight recipe: within each head, the dimensions that turn together come side by side (`rope.paired_order`).

For the rows of a weight, or a gain, whose first `heads` heads of each expert are to be turned; the rest stays.
"""

import torch
from torch import Tensor

from horsepower.kernels.float8 import bits
from horsepower.kernels.registry import Cost, Op, register
from horsepower.kernels.rope import paired_order

SCHEMA = "(Tensor x, int experts, int heads, int head_dim, int turned) -> Tensor"


def outputs(x: Tensor, experts: int, heads: int, head_dim: int, turned: int) -> tuple[Tensor, ...]:
    """x [experts * (heads * head_dim + any), ...] -> the same shape; `turned` dimensions of each head are rotated.

    Raises ValueError for another shape.
    """
    if experts < 1 or x.shape[0] % experts or x.shape[0] // experts < heads * head_dim:
        raise ValueError(f"x: got {list(x.shape)}, allowed: [{experts} * at least {heads * head_dim}, ...]")
    return (torch.empty_like(x, memory_format=torch.contiguous_format),)


def reference(x: Tensor, experts: int, heads: int, head_dim: int, turned: int) -> tuple[Tensor, ...]:
    """Plain PyTorch."""
    own = bits(x).unflatten(0, (experts, -1))
    paired, rest = own.split((heads * head_dim, own.shape[1] - heads * head_dim), dim=1)
    paired = paired.unflatten(1, (heads, head_dim))[:, :, paired_order(head_dim, turned)].flatten(1, 2)
    return (torch.cat((paired, rest), dim=1).flatten(0, 1).view(x.dtype),)


def cost(x: Tensor, experts: int, heads: int, head_dim: int, turned: int) -> Cost:
    """No arithmetic."""
    return Cost(flops=0, bytes=2 * x.numel() * x.itemsize)


PAIR_HEADS = register(Op("pair_heads", SCHEMA, outputs, reference, cost))
