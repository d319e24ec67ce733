"""The QKV projection by tiles that hold whole heads, normed and turned before they leave the registers.

Heads are paired: to bring half-split partners together would cost a pass through shared memory.
"""

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu.launch import Config, default, writes_no_codes
from horsepower.kernels.gpu.tiles import (
    ROWS,
    codes,
    descriptor,
    flat,
    launch_tiles,
    pitched,
    product,
    product_claims,
    refuses,
    row_tiles,
    scaled,
    store,
    tile_at,
    two_products,
    weight_tile,
)

HEAD = 128


@triton.jit
def normed_and_turned(
    u, does, gain, rope, rope_pitch, row, end, eps, HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Of u [BM, BN], whose heads of 128 are paired; u itself, times one, unless `does`.

    A branch here would serialise wgmma, and to choose between u and the result would spill.
    """
    a, b = tl.split(tl.reshape(u, (BM, BN // 128, 64, 2)))
    scale = tl.where(does, tl.rsqrt(tl.sum(a * a + b * b, axis=2) / 128 + eps), 1.0)[:, :, None]
    pair = tl.arange(0, 64)
    a *= scale * tl.where(does, tl.load(gain + 2 * pair).to(tl.float32), 1.0)[None, None, :]
    b *= scale * tl.where(does, tl.load(gain + 2 * pair + 1).to(tl.float32), 1.0)[None, None, :]
    turns = (pair < HALF)[None, :]
    if TMA:
        sin, cos = rope.load([row, 0]), rope.load([row, HALF])
    else:
        rows = tl.minimum(tl.arange(0, BM), end - 1 - row)
        at = rope + row.to(tl.int64) * rope_pitch + (rows[:, None] * rope_pitch + pair[None, :])
        sin, cos = tl.load(at, mask=turns, other=0.0), tl.load(at + HALF, mask=turns, other=1.0)
    sin = tl.where(does & turns, sin.to(tl.float32), 0.0)[:, None, :]
    cos = tl.where(does & turns, cos.to(tl.float32), 1.0)[:, None, :]
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BM, BN))


@triton.jit
def store_heads(
    out, pitch, rest, rest_pitch, row, end, column, width, does, values, REST: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Write a tile to `out`. Where heads are codes, and the other columns are not, `rest` has a store of its own.

    One of the two writes nothing: a branch would serialise wgmma here too.
    """
    if out.dtype == rest.dtype:
        store(out, pitch, row, end, column, width, values, BM, BN, UNIT)
    else:
        store(out, pitch, row, end, column, tl.where(does, width, 0), values, BM, BN, UNIT)
        store(rest, rest_pitch, row, end, column, tl.where(does, 0, REST), values, BM, BN, UNIT)


@triton.jit(do_not_specialize=ROWS)
def linear_qk_norm_rope_kernel(
    a, b, a_pitch, b_pitch, second, third, L, b_more, x_scale, weight_scale, q, k, rest, q_pitch, k_pitch, rest_pitch,
    q_gain, k_gain, rope, rope_pitch, eps, N: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, Q: tl.constexpr,
    KEYS: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, MORE: tl.constexpr = 0,
):  # fmt: skip
    tl.static_assert(BN % 128 == 0 and MORE % 128 == 0)
    WIDTH: tl.constexpr = BN + MORE
    FLAT: tl.constexpr = flat(b.dtype, TMA, MORE, EXPERTS)
    TO_KEYS: tl.constexpr = (Q + WIDTH - 1) // WIDTH  # each part begins a tile of its own
    TO_REST: tl.constexpr = TO_KEYS + (KEYS + WIDTH - 1) // WIDTH
    REST: tl.constexpr = N - Q - KEYS
    COLUMNS: tl.constexpr = TO_REST + (REST + WIDTH - 1) // WIDTH
    tiles = row_tiles(second, third, L, EXPERTS, BM) * COLUMNS
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
        row, end, expert, n = tile_at(tile, COLUMNS, second, third, L, EXPERTS, BM, GROUP)
        before, out, pitch, gain, width, column = 0, q, q_pitch, q_gain, Q, n * WIDTH
        if n >= TO_REST:
            before, column = Q + KEYS, (n - TO_REST) * WIDTH
            if q.dtype == rest.dtype:
                out, pitch, width = rest, rest_pitch, REST
        elif n >= TO_KEYS:
            before, out, pitch, gain, width, column = Q, k, k_pitch, k_gain, KEYS, (n - TO_KEYS) * WIDTH
        b_row, b_end = expert * N + before + column, expert * N + N
        if MORE:
            acc, more = two_products(a, b, b_more, row, b_row, K, BM, BN, MORE, BK)
        else:
            acc = product(a, b, a_pitch, b_pitch, row, end, b_row, b_end, K, BM, BN, BK, TMA)
        gain += expert * 128
        acc = scaled(acc, x_scale, weight_scale, row, end, b_row, b_end, BM, BN)
        values = normed_and_turned(acc, n < TO_REST, gain, rope, rope_pitch, row, end, eps, HALF, BM, BN, TMA)
        store_heads(
            out, pitch, rest, rest_pitch, row, end, column, width, n < TO_REST, values, REST, BM, BN, UNIT
        )  # fmt: skip
        if MORE:
            more = scaled(more, x_scale, weight_scale, row, end, b_row + BN, b_end, BM, MORE)
            values = normed_and_turned(more, n < TO_REST, gain, rope, rope_pitch, row, end, eps, HALF, BM, MORE, TMA)
            store_heads(
                out, pitch, rest, rest_pitch, row, end, column + BN, width, n < TO_REST, values, REST, BM, MORE, UNIT
            )  # fmt: skip


CONFIGS = {
    "sm_90": (
        Config(8, 3, {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "TMA": 1}),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "TMA": 1}),
        Config(8, 3, {"BM": 128, "BN": 128, "BK": 128, "GROUP": 8, "TMA": 1, "MORE": 128}, "fp8"),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 128, "GROUP": 8, "TMA": 1}, "fp8"),
        Config(8, 3, {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "TMA": 1}, "w8a16"),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "TMA": 1}, "w8a16"),
    ),
    "sm_80": (
        Config(8, 4, {"BM": 128, "BN": 256, "BK": 32, "GROUP": 8, "TMA": 0}),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 32, "GROUP": 8, "TMA": 0}),
        Config(8, 4, {"BM": 128, "BN": 256, "BK": 32, "GROUP": 8, "TMA": 0}, "w8a16"),
        Config(8, 3, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "TMA": 0}, "w8a16"),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 32, "GROUP": 8, "TMA": 0}, "w8a16"),
    ),
}
CLAIMS = product_claims("linear_qk_norm_rope_kernel")


def supports(
    x: Tensor, weight: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Tensor, experts: int, counts: Sequence[int],
    heads_q: int, heads_kv: int, head_dim: int, eps: float, paired: bool, x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None, dtype: torch.dtype | None = None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take these inputs, or None."""
    if not paired:
        return "partners do not stand side by side"
    if head_dim != HEAD:
        return f"a head has {head_dim} dimensions, not {HEAD}"
    if any(each.dtype == torch.float64 for each in (q_gain, k_gain, rope)):
        return "float64"
    if q_gain.dtype != k_gain.dtype:
        return "the gains differ in dtype"
    half = rope[:, rope.shape[1] // 2 :]
    if not half.shape[1] or not pitched(rope) or not pitched(half) or q_gain.stride(0) != 1 or k_gain.stride(0) != 1:
        return "table or gains cannot be read as they lie"
    reason = None if dtype is None else writes_no_codes(x, dtype)
    return reason or refuses(x, weight, x_scale, weight_scale)


def run(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, weight: Tensor, q_gain: Tensor, k_gain: Tensor, rope: Tensor,
    experts: int, counts: Sequence[int], heads_q: int, heads_kv: int, head_dim: int, eps: float, paired: bool,
    x_scale: Tensor | None = None, weight_scale: Tensor | None = None, dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> None:  # fmt: skip
    """Sums, norm and rotation in float32, one cast. Rows of x, weight, rope and the results may be padded."""
    pitches = [each.stride(0) for each in out]
    unit = gcd(*pitches, 16 // out[0].itemsize)
    config = config or default(CONFIGS, x, weight)
    table = descriptor(rope, config.constants["BM"], HEAD // 2) if config.constants["TMA"] and rope.numel() else rope
    launch_tiles(
        linear_qk_norm_rope_kernel,
        x,
        weight,
        experts,
        counts,
        weight_tile(x, weight, "MORE", config),
        x_scale,
        weight_scale,
        *out,
        *(pitch // unit for pitch in pitches),
        q_gain,
        k_gain,
        table,
        rope.stride(0),
        eps,
        config=config,
        Q=heads_q * HEAD,
        KEYS=heads_kv * HEAD,
        HALF=rope.shape[1] // 2,
        UNIT=unit,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The QKV projection of the DiT with its gates, by modality and shared."""
    for experts in (1, 3):
        gain, rope = torch.empty(experts * HEAD, device="meta"), torch.empty(4300, 96, device="meta")
        shape = (gain, gain, rope, experts, [4000, 100, 200], 40, 8, HEAD, 1e-6, True)
        x, weight = (torch.empty(rows, 5120, dtype=torch.bfloat16, device="meta") for rows in (4300, experts * 7208))
        yield f"5120 x 7208, {experts} experts", (x, weight, *shape)
        for form in ("fp8", "w8a16"):
            x, weight, *scales = codes(form, 5120, experts * 7208)
            yield f"5120 x 7208, {experts} experts, {form}", (x, weight, *shape, *scales)
            if form == "fp8":
                yield f"5120 x 7208, {experts} experts, {form} into codes", (x, weight, *shape, *scales, E4M3)
