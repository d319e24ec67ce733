"""The up-projection with its activation: the wide intermediate never leaves in float32."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from horsepower.kernels.activation import outputs as activation_outputs
from horsepower.kernels.linear import outputs as linear_outputs
from horsepower.kernels.registry import fused, register
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = (
    "(Tensor x, Tensor weight, int experts, SymInt[] counts, str kind, ScalarType dtype, Tensor? x_scale=None, "
    "Tensor? weight_scale=None) -> Tensor"
)


def outputs(
    x: Tensor, weight: Tensor, experts: int, counts: Sequence[int], kind: str, dtype: torch.dtype,
    x_scale: Tensor | None = None, weight_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x [..., C], weight [experts * U, C] -> [..., U / 2] for swiglu7, [..., U] for gelu7, in `dtype`."""
    return activation_outputs(linear_outputs(x, weight, experts, counts, x_scale, weight_scale)[0], kind, dtype)


def expand(
    call: Callable[..., Any], x: Any, weight: Any, experts: int, counts: Any, kind: str, dtype: torch.dtype,
    *scales: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The product, then the activation."""
    u = call(torch.ops.horsepower.linear.default, x, weight, experts, counts, *scales)
    return (call(torch.ops.horsepower.activation.default, u, kind, dtype),)


LINEAR_ACTIVATION = register(
    fused("linear_activation", SCHEMA, outputs, expand, kernels=(triton_kernel("linear_activation"),))
)
