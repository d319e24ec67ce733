"""How large normed queries and keys can become, from the gain of their norm alone.

A normed head has a length of at most sqrt(D), times its gain; rotation leaves the length as it is.
"""

import math

import torch
from torch import Tensor

from horsepower.kernels.float8 import scale_up_to, widen
from horsepower.kernels.registry import Cost, Op, register

SCHEMA = "(Tensor gain, int experts) -> Tensor"


def outputs(gain: Tensor, experts: int) -> tuple[Tensor, ...]:
    """gain [experts * D] -> [1], float32: the power of two that, as a scale, brings the heads into eight bits.

    Raises ValueError for gains that experts do not divide, and for none.
    """
    if gain.ndim != 1 or experts < 1 or not gain.shape[0] or gain.shape[0] % experts:
        raise ValueError(f"gain: got {list(gain.shape)}, allowed: [{experts} D], D above 0")
    return (gain.new_empty(1, dtype=torch.float32),)


def reference(gain: Tensor, experts: int) -> tuple[Tensor, ...]:
    """Plain PyTorch."""
    return (scale_up_to(widen(gain).abs().amax() * math.sqrt(gain.shape[0] // experts))[None],)


def cost(gain: Tensor, experts: int) -> Cost:
    """A comparison a value."""
    return Cost(flops=gain.numel(), bytes=gain.numel() * gain.itemsize)


HEAD_BOUND = register(Op("head_bound", SCHEMA, outputs, reference, cost))
