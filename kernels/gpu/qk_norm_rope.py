"""Norm, rotation and cast of queries and keys, some heads of a row a program: read once, written once."""

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu.launch import Config, default, launch, writes_no_codes
from horsepower.kernels.modality import first_rows
from horsepower.kernels.target import GPUS


@triton.jit
def loaded(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def turned(a, b, sin, cos):
    return a * cos - b * sin, b * cos + a * sin


@triton.jit(do_not_specialize=("second", "third"))
def qk_norm_rope_kernel(
    qkv, q_gain, k_gain, rope, q, k, pitch, rope_pitch, second, third, eps, HEADS_Q: tl.constexpr,
    HEADS_KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, EXPERTS: tl.constexpr, PAIRED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, heads, gain, out = block * HEADS, HEADS_Q, q_gain, q + row * HEADS_Q * D
    qkv += row * (pitch * UNIT)  # so that Triton knows how wide loads may be
    if block >= tl.cdiv(HEADS_Q, HEADS):
        first, heads, gain, out = first - tl.cdiv(HEADS_Q, HEADS) * HEADS, HEADS_KV, k_gain, k + row * HEADS_KV * D
        qkv += HEADS_Q * D
    if EXPERTS > 1:
        gain += ((row >= second).to(tl.int32) + (row >= third).to(tl.int32)) * D
    head = (first + tl.arange(0, HEADS))[:, None]
    there = head < heads
    if PAIRED:
        j = tl.arange(0, BLOCK)[None, :]
        a, b = tl.split(tl.reshape(loaded(qkv + head * D + j, there & (j < D)), (HEADS, BLOCK // 2, 2)))
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1)[:, None] / D + eps)
        gain_a, gain_b = tl.split(tl.reshape(loaded(gain + j, j < D), (1, BLOCK // 2, 2)))
        a, b = a * scale * gain_a, b * scale * gain_b
        pair = tl.arange(0, BLOCK // 2)[None, :]
        at = rope + row * rope_pitch + pair
        new_a, new_b = turned(a, b, loaded(at, pair < HALF), loaded(at + HALF, pair < HALF))
        y = tl.join(tl.where(pair < HALF, new_a, a), tl.where(pair < HALF, new_b, b))
        tl.store(out + head * D + j, tl.reshape(y, (HEADS, BLOCK)).to(q.dtype.element_ty), mask=there & (j < D))
    else:
        j = tl.arange(0, PAIRS)[None, :]
        r = 2 * HALF + tl.arange(0, REST)[None, :]
        pair, rest = there & (j < HALF), there & (r < D)
        a, b = loaded(qkv + head * D + j, pair), loaded(qkv + head * D + HALF + j, pair)
        c = loaded(qkv + head * D + r, rest)
        squares = tl.sum(a * a + b * b, axis=1) + tl.sum(c * c, axis=1)
        scale = tl.rsqrt(squares[:, None] / D + eps)
        a, b = a * scale * loaded(gain + j, j < HALF), b * scale * loaded(gain + HALF + j, j < HALF)
        c *= scale * loaded(gain + r, r < D)
        at = rope + row * rope_pitch + j
        a, b = turned(a, b, loaded(at, j < HALF), loaded(at + HALF, j < HALF))
        tl.store(out + head * D + j, a.to(q.dtype.element_ty), mask=pair)
        tl.store(out + head * D + HALF + j, b.to(q.dtype.element_ty), mask=pair)
        tl.store(out + head * D + r, c.to(q.dtype.element_ty), mask=rest)


CONFIGS = {arch: (Config(4, 1, {"HEADS": 8}), Config(4, 1, {"HEADS": 16})) for arch in ("sm_80", "sm_90")}
CLAIMS = {arch: {"qk_norm_rope_kernel": ("LDG.E.128", "STG.E.128|STG.E.64|F2FP.SATFINITE.E4M3")} for arch in GPUS}


def supports(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Tensor, experts: int, counts: Sequence[int], heads_q: int,
    heads_kv: int, eps: float, paired: bool, dtype: torch.dtype | None = None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take these inputs, or None."""
    tensors = (qkv, q_gain, k_gain, rope)
    if any(x.dtype == torch.float64 for x in tensors):
        return "float64"
    if q_gain.dtype != k_gain.dtype:
        return "the gains differ in dtype"
    if dtype is not None and (reason := writes_no_codes(qkv, dtype)):
        return reason
    if any(x.stride(-1) != 1 for x in tensors):
        return "the last dimension is not contiguous"
    return "a head does not fit into registers" if q_gain.shape[0] > experts * 1024 else None


def run(
    out: tuple[Tensor, ...], _workspace: None, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Tensor, experts: int,
    counts: Sequence[int], heads_q: int, heads_kv: int, eps: float, paired: bool, dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> None:  # fmt: skip
    """A block of heads a program; sums in float32. Rows of qkv and rope may be strided."""
    config = config or default(CONFIGS, qkv)
    q, k = out
    L, D, half = qkv.shape[0], q.shape[2], rope.shape[1] // 2
    second, third = first_rows(experts == 3, counts, L)
    unit = gcd(qkv.stride(0), 8)
    launch(
        qk_norm_rope_kernel,
        (L, sum(triton.cdiv(heads, config.constants["HEADS"]) for heads in (heads_q, heads_kv))),
        qkv,
        q_gain,
        k_gain,
        rope,
        q,
        k,
        qkv.stride(0) // unit,
        rope.stride(0),
        second,
        third,
        eps,
        HEADS_Q=heads_q,
        HEADS_KV=heads_kv,
        D=D,
        HALF=half,
        EXPERTS=experts,
        PAIRED=paired,
        BLOCK=max(2, triton.next_power_of_2(D)),
        PAIRS=triton.next_power_of_2(max(1, half)),
        REST=triton.next_power_of_2(max(1, D - 2 * half)),
        UNIT=unit,
        config=config,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Queries and keys of the DiT, by modality and shared, in both orders."""
    for experts in (1, 3):
        for paired in (False, True):
            qkv = torch.empty(4300, 7208, dtype=torch.bfloat16, device="meta")
            gain, rope = torch.empty(experts * 128, device="meta"), torch.empty(4300, 96, device="meta")
            inputs = (qkv, gain, gain, rope, experts, [4000, 100, 200], 40, 8, 1e-6, paired)
            yield f"{experts} experts{', paired' if paired else ''}", inputs
            if experts == 1:
                yield f"{experts} experts{', paired' if paired else ''}, into codes", (*inputs, E4M3)
