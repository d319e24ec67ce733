"""The QKV projection with its epilogue: queries and keys normed, rotated and cast; values and gates as they come.

Paired: the rows of the weight that make queries and keys, and their gains, come head by head in `rope.paired_order`.
"""

import sys
from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor

from horsepower.kernels.linear import outputs as linear_outputs
from horsepower.kernels.qk_norm_rope import outputs as qk_outputs
from horsepower.kernels.registry import fused, register
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor q_gain, Tensor k_gain, Tensor rope, int experts, SymInt[] counts, int heads_q, "
    "int heads_kv, int head_dim, float eps, bool paired, Tensor? x_scale=None, Tensor? weight_scale=None, "
    "ScalarType? dtype=None) "
    "-> (Tensor, Tensor, Tensor)"
)


def outputs(
    x: Tensor, weight: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Tensor, experts: int, counts: Sequence[int],
    heads_q: int, heads_kv: int, head_dim: int, eps: float, paired: bool, x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x [L, C], weight [experts * O, C] -> q [L, heads_q, D], k [L, heads_kv, D], the other columns [L, O - q - k].

    dtype: of q and k alone, see `qk_norm_rope`.
    """
    (u,) = linear_outputs(x, weight, experts, counts, x_scale, weight_scale)
    q, k = qk_outputs(u, q_gain, k_gain, rope, experts, counts, heads_q, heads_kv, eps, paired, dtype)
    return q, k, u[:, (heads_q + heads_kv) * head_dim :]


def expand(
    call: Callable[..., Any], x: Any, weight: Any, q_gain: Any, k_gain: Any, rope: Any, experts: int, counts: Any,
    heads_q: int, heads_kv: int, head_dim: int, eps: float, paired: bool, x_scale: Any = None,
    weight_scale: Any = None, dtype: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The product, then the epilogue over its columns."""
    ops = torch.ops.horsepower
    scales, into = () if weight_scale is None else (x_scale, weight_scale), () if dtype is None else (dtype,)
    u = call(ops.linear.default, x, weight, experts, counts, *scales)
    qk = call(ops.qk_norm_rope.default, u, q_gain, k_gain, rope, experts, counts, heads_q, heads_kv, eps, paired, *into)
    rest = call(torch.ops.aten.slice.Tensor, u, 1, (heads_q + heads_kv) * head_dim, sys.maxsize)
    return call(getitem, qk, 0), call(getitem, qk, 1), rest


LINEAR_QK_NORM_ROPE = register(
    fused("linear_qk_norm_rope", SCHEMA, outputs, expand, kernels=(triton_kernel("linear_qk_norm_rope"),))
)
