"""RMS norm whose result leaves in eight bits: the row is normed and quantised in float32."""

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor

from horsepower.kernels.quantise import outputs as quantise_outputs
from horsepower.kernels.registry import fused, register
from horsepower.kernels.rms_norm import outputs as norm_outputs
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = "(Tensor x, Tensor? gain, int experts, SymInt[] counts, float eps) -> (Tensor, Tensor)"


def outputs(x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int], eps: float) -> tuple[Tensor, ...]:
    """x [L, C] -> its norm: codes [L, C], scales [L, 1]."""
    return quantise_outputs(norm_outputs(x, gain, experts, counts, eps, torch.float32)[0])


def expand(call: Callable[..., Any], x: Any, gain: Any, experts: int, counts: Any, eps: float) -> tuple[Any, ...]:
    """The norm, then the codes."""
    ops = torch.ops.horsepower
    normed = call(ops.rms_norm.default, x, gain, experts, counts, eps, torch.float32)
    quantised = call(ops.quantise.default, normed)
    return call(getitem, quantised, 0), call(getitem, quantised, 1)


RMS_NORM_QUANTISE = register(
    fused("rms_norm_quantise", SCHEMA, outputs, expand, kernels=(triton_kernel("rms_norm_quantise"),))
)
