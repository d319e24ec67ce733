"""A branch's last projection, its addition to the residual and the norm that opens the next branch.

With a post gain the branch is normalised again before the addition.
"""

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor

from horsepower.kernels.add_rms_norm import outputs as add_outputs
from horsepower.kernels.linear import outputs as linear_outputs
from horsepower.kernels.registry import fused, register
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = (
    "(Tensor x, Tensor weight, int experts, Tensor residual, Tensor? post_gain, Tensor gain, SymInt[] counts, "
    "float eps, ScalarType dtype, Tensor? x_scale=None, Tensor? weight_scale=None) -> (Tensor, Tensor)"
)
SQUARES_COLUMNS = 128  # the least that a tile has whose squares are summed


def outputs(
    x: Tensor, weight: Tensor, experts: int, residual: Tensor, post_gain: Tensor | None, gain: Tensor,
    counts: Sequence[int], eps: float, dtype: torch.dtype, x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x [L, I], weight [experts * C, I], residual [L, C] -> their sum [L, C], and it normed and cast to `dtype`."""
    (branch,) = linear_outputs(x, weight, experts, counts, x_scale, weight_scale)
    return add_outputs(residual, branch, post_gain, gain, counts, eps, dtype)


def expand(
    call: Callable[..., Any], x: Any, weight: Any, experts: int, residual: Any, post_gain: Any, gain: Any, counts: Any,
    eps: float, dtype: torch.dtype, *scales: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The product, then one pass over its rows."""
    ops = torch.ops.horsepower
    branch = call(ops.linear.default, x, weight, experts, counts, *scales)
    both = call(ops.add_rms_norm.default, residual, branch, post_gain, gain, counts, eps, dtype)
    return call(getitem, both, 0), call(getitem, both, 1)


def workspace(x: Tensor, weight: Tensor, experts: int, *_: object) -> int:
    """Bytes for the sums of squares of each row and tile, float32."""
    return x.shape[0] * -(-(weight.shape[0] // experts) // SQUARES_COLUMNS) * 4


def rereads(*inputs: Any) -> int:
    """Bytes of the norm, which follows in a launch of its own: it reads the sum, and writes the last result."""
    return sum(x.numel() * x.itemsize for x in outputs(*inputs))


LINEAR_ADD_RMS_NORM = register(
    fused(
        "linear_add_rms_norm",
        SCHEMA,
        outputs,
        expand,
        kernels=(triton_kernel("linear_add_rms_norm", workspace, rereads),),
    )
)
