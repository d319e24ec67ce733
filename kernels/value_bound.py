"""How large values can become that a projection makes of normed rows, from its weight and the gain of the norm alone.

A normed row has a length of at most sqrt(C), so that by Cauchy and Schwarz |w (n * gain)| <= sqrt(C) |w * gain|. What
attention makes of such values is no larger: a weighted mean of them, times a gate below 1.
"""

import math

import torch
from torch import Tensor

from horsepower.kernels.float8 import scale_up_to, widen
from horsepower.kernels.registry import Cost, Op, register

SCHEMA = "(Tensor weight, Tensor? weight_scale, Tensor? gain, int experts, int first, int rows) -> Tensor"
MARGIN = 1 + 2.0**-4  # normed rows may be quantised, which lengthens them by half a unit in the last place


def outputs(
    weight: Tensor, weight_scale: Tensor | None, gain: Tensor | None, experts: int, first: int, rows: int
) -> tuple[Tensor, ...]:
    """weight [experts * O, C], perhaps codes with weight_scale [experts * O, 1] or [experts, 1].

    gain [C], [experts * C] or none.
    -> [1], float32: the power of two that, as a scale, brings outputs `first` to `first + rows` of each expert into
    eight bits. Raises ValueError for inputs that do not belong together.
    """
    if (
        weight.ndim != 2 or experts < 1 or weight.shape[0] % experts
        or not 0 <= first < first + rows <= weight.shape[0] // experts
    ):  # fmt: skip
        raise ValueError(f"weight: got {list(weight.shape)}, allowed: [{experts} * at least {first + rows}, C]")
    if weight_scale is not None and weight_scale.shape not in ((weight.shape[0], 1), (experts, 1)):
        allowed = f"[{weight.shape[0]}, 1] or [{experts}, 1]"
        raise ValueError(f"weight_scale: got {list(weight_scale.shape)}, allowed: {allowed}")
    if gain is not None and gain.shape not in ((weight.shape[1],), (experts * weight.shape[1],)):
        raise ValueError(f"gain: got {list(gain.shape)}, allowed: [C] or [{experts} C] with C = {weight.shape[1]}")
    return (weight.new_empty(1, dtype=torch.float32),)


def reference(
    weight: Tensor, weight_scale: Tensor | None, gain: Tensor | None, experts: int, first: int, rows: int
) -> tuple[Tensor, ...]:
    """Plain PyTorch; to a power of two, so that the order of sums does not show, and scales stay exact."""
    own = weight.unflatten(0, (experts, -1))[:, first : first + rows].float()
    if weight_scale is not None:
        scales = weight_scale.unflatten(0, (experts, -1)).expand(-1, weight.shape[0] // experts, -1)
        own = own * scales[:, first : first + rows]
    if gain is not None:
        own = own * widen(gain).view(-1, 1, weight.shape[1])
    length = torch.linalg.vector_norm(own, dim=-1, dtype=torch.float64).amax()  # whose squares may exceed float32
    return (scale_up_to(length * (math.sqrt(weight.shape[1]) * MARGIN))[None],)


def cost(weight: Tensor, weight_scale: Tensor | None, gain: Tensor | None, experts: int, first: int, rows: int) -> Cost:
    """A square and its sum a value."""
    return Cost(flops=3 * experts * rows * weight.shape[1], bytes=experts * rows * weight.shape[1] * weight.itemsize)


VALUE_BOUND = register(Op("value_bound", SCHEMA, outputs, reference, cost))
