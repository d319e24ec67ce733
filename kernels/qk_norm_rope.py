"""Norm, rotation and cast of queries and keys, straight from the columns of the QKV projection.

Codes of eight bits have one scale, whose inverse is in the gains.
Paired: columns and gains of each head come in the order `rope.paired_order`, and so do the results; q k^T is the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from horsepower import _native
from horsepower.kernels.float8 import E4M3, codes_of
from horsepower.kernels.modality import check_experts, first_rows
from horsepower.kernels.native_library import ISAS, refuses, threads
from horsepower.kernels.registry import Cost, Kernel, Op, register
from horsepower.kernels.rms_norm import reference as rms_norm
from horsepower.kernels.rope import check_rope, rotate
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = (
    "(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor rope, int experts, SymInt[] counts, int heads_q, int heads_kv, "
    "float eps, bool paired, ScalarType? dtype=None) -> (Tensor, Tensor)"
)


def outputs(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Tensor, experts: int, counts: Sequence[int], heads_q: int,
    heads_kv: int, eps: float, paired: bool, dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """qkv [L, (heads_q + heads_kv) * D + any] -> q [L, heads_q, D] and k [L, heads_kv, D] in `dtype`: qkv's, or codes.

    Gains [experts * D]; rope [L, 2 h], sines then cosines. Raises ValueError for inputs that do not belong together.
    """
    if qkv.ndim != 2:
        raise ValueError(f"qkv: got {list(qkv.shape)}, allowed: [L, columns]")
    L = qkv.shape[0]
    check_experts(experts, counts, L)
    if q_gain.shape != k_gain.shape or q_gain.ndim != 1 or q_gain.shape[0] % experts:
        raise ValueError(f"q_gain, k_gain: got {list(q_gain.shape)}, {list(k_gain.shape)}, allowed: [{experts} D] both")
    D = q_gain.shape[0] // experts
    if qkv.shape[1] < (heads_q + heads_kv) * D:
        raise ValueError(f"qkv: got {list(qkv.shape)}, allowed: [L, at least {(heads_q + heads_kv) * D}]")
    check_rope(rope, L, D)
    if dtype not in (None, qkv.dtype, E4M3):
        raise ValueError(f"dtype: got {dtype}, allowed: None, {qkv.dtype}, {E4M3}")
    dtype = dtype or qkv.dtype
    return qkv.new_empty((L, heads_q, D), dtype=dtype), qkv.new_empty((L, heads_kv, D), dtype=dtype)


def reference(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Tensor, experts: int, counts: Sequence[int], heads_q: int,
    heads_kv: int, eps: float, paired: bool, dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same in plain PyTorch; float64 inputs give the exact answer."""
    D = q_gain.shape[0] // experts
    wide = torch.promote_types(qkv.dtype, torch.float32)
    dtype = dtype or qkv.dtype

    def turned(columns: Tensor, gain: Tensor) -> Tensor:
        heads = columns.unflatten(1, (-1, D))
        made = rotate(rms_norm(heads, gain, experts, counts, eps, wide)[0], rope, paired)
        return codes_of(made, 1.0) if dtype == E4M3 else made.to(dtype)

    q, k = qkv[:, : (heads_q + heads_kv) * D].split((heads_q * D, heads_kv * D), dim=1)
    return turned(q, q_gain), turned(k, k_gain)


def native_supports(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Tensor, experts: int, counts: Sequence[int], heads_q: int,
    heads_kv: int, eps: float, paired: bool, dtype: torch.dtype | None = None,
) -> str | None:  # fmt: skip
    """Why the C++ kernel cannot take these inputs, or None."""
    if paired:
        return "partners stand side by side"
    if dtype not in (None, qkv.dtype):
        return f"into {dtype}"
    if qkv.dtype not in (torch.float32, torch.bfloat16):
        return "qkv is neither float32 nor bfloat16"
    if any(x.dtype != torch.float32 for x in (q_gain, k_gain, rope)):
        return "gains and rope are not float32"
    return refuses(qkv, q_gain, k_gain, rope)


def native(
    out: tuple[Tensor, ...], _workspace: None, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Tensor, experts: int,
    counts: Sequence[int], heads_q: int, heads_kv: int, eps: float, paired: bool, dtype: torch.dtype | None = None,
    isa: str = ISAS[0],
) -> None:  # fmt: skip
    """C++ in the widest instruction set of this CPU; rows may be strided, one row runs on one thread."""
    q, k = out
    L, D = qkv.shape[0], q.shape[2]
    second, third = first_rows(experts == 3, counts, L)
    _native.qk_norm_rope(
        isa,
        qkv.data_ptr(),
        q_gain.data_ptr(),
        k_gain.data_ptr(),
        rope.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        qkv.stride(0),
        rope.stride(0),
        D if experts == 3 else 0,
        L,
        heads_q,
        heads_kv,
        D,
        rope.shape[1] // 2,
        second,
        third,
        eps,
        qkv.dtype == torch.bfloat16,
        threads(L * (heads_q + heads_kv) * D),
    )


def cost(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Tensor, experts: int, counts: Sequence[int], heads_q: int,
    heads_kv: int, eps: float, paired: bool, dtype: torch.dtype | None = None,
) -> Cost:  # fmt: skip
    """Per value: four operations of the norm, three of the rotation; each tensor passes memory once."""
    L, heads = qkv.shape[0], heads_q + heads_kv
    n = L * heads * (q_gain.shape[0] // experts)
    gains = (q_gain.numel() + k_gain.numel()) * q_gain.itemsize
    moved = n * (qkv.itemsize + (dtype or qkv.dtype).itemsize) + rope.numel() * rope.itemsize
    return Cost(4 * n + 3 * heads * rope.numel(), moved + gains)


QK_NORM_ROPE = register(
    Op(
        "qk_norm_rope",
        SCHEMA,
        outputs,
        reference,
        cost,
        kernels=(Kernel("native", native_supports, native), triton_kernel("qk_norm_rope")),
    )
)
