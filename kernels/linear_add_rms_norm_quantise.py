"""A branch's last projection, its addition to the residual, and the norm that follows, in eight bits."""

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor

from horsepower.kernels.add_rms_norm_quantise import outputs as add_outputs
from horsepower.kernels.linear import outputs as linear_outputs
from horsepower.kernels.registry import fused, register
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = (
    "(Tensor x, Tensor weight, int experts, Tensor residual, Tensor? post_gain, Tensor gain, SymInt[] counts, "
    "float eps, Tensor? x_scale=None, Tensor? weight_scale=None) -> (Tensor, Tensor, Tensor)"
)


def outputs(
    x: Tensor, weight: Tensor, experts: int, residual: Tensor, post_gain: Tensor | None, gain: Tensor,
    counts: Sequence[int], eps: float, x_scale: Tensor | None = None, weight_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x [L, I], weight [experts * C, I], residual [L, C] -> sum [L, C]; it normed: codes [L, C], scales [L, 1]."""
    (branch,) = linear_outputs(x, weight, experts, counts, x_scale, weight_scale)
    return add_outputs(residual, branch, post_gain, gain, counts, eps)


def expand(
    call: Callable[..., Any], x: Any, weight: Any, experts: int, residual: Any, post_gain: Any, gain: Any, counts: Any,
    eps: float, *scales: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The product, then one pass over its rows."""
    ops = torch.ops.horsepower
    branch = call(ops.linear.default, x, weight, experts, counts, *scales)
    made = call(ops.add_rms_norm_quantise.default, residual, branch, post_gain, gain, counts, eps)
    return call(getitem, made, 0), call(getitem, made, 1), call(getitem, made, 2)


def rereads(*inputs: Any) -> int:
    """Bytes of the norm, which follows in a launch of its own: it reads the sum, and writes codes and scales."""
    return sum(x.numel() * x.itemsize for x in outputs(*inputs))


LINEAR_ADD_RMS_NORM_QUANTISE = register(
    fused(
        "linear_add_rms_norm_quantise",
        SCHEMA,
        outputs,
        expand,
        kernels=(triton_kernel("linear_add_rms_norm_quantise", rereads=rereads),),
    )
)
