"""Residual addition and RMS norm whose result leaves in eight bits: the row is normed and quantised in float32."""

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor

from horsepower.kernels.add_rms_norm import outputs as norm_outputs
from horsepower.kernels.quantise import outputs as quantise_outputs
from horsepower.kernels.registry import fused, register
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = (
    "(Tensor residual, Tensor branch, Tensor? post_gain, Tensor gain, SymInt[] counts, float eps) "
    "-> (Tensor, Tensor, Tensor)"
)


def outputs(
    residual: Tensor, branch: Tensor, post_gain: Tensor | None, gain: Tensor, counts: Sequence[int], eps: float
) -> tuple[Tensor, ...]:
    """residual, branch [L, C] -> their sum [L, C]; it normed: codes [L, C], scales [L, 1]."""
    total, normed = norm_outputs(residual, branch, post_gain, gain, counts, eps, torch.float32)
    return total, *quantise_outputs(normed)


def expand(
    call: Callable[..., Any], residual: Any, branch: Any, post_gain: Any, gain: Any, counts: Any, eps: float
) -> tuple[Any, ...]:
    """The addition and the norm, then the codes."""
    ops = torch.ops.horsepower
    both = call(ops.add_rms_norm.default, residual, branch, post_gain, gain, counts, eps, torch.float32)
    quantised = call(ops.quantise.default, call(getitem, both, 1))
    return call(getitem, both, 0), call(getitem, quantised, 0), call(getitem, quantised, 1)


ADD_RMS_NORM_QUANTISE = register(
    fused("add_rms_norm_quantise", SCHEMA, outputs, expand, kernels=(triton_kernel("add_rms_norm_quantise"),))
)
