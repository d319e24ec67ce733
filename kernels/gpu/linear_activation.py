"""The up-projection by tiles; its activation on the float32 sums, before they leave the registers."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.activation import FP8_GAINS
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu.launch import Config, default, writes_no_codes
from horsepower.kernels.gpu.tiles import (
    ROWS,
    codes,
    flat,
    launch_tiles,
    product,
    product_claims,
    refuses,
    row_tiles,
    scaled,
    store,
    tile_at,
    two_products,
    weight_tile,
    writable,
)


@triton.jit
def sigmoid(z):
    return 1 / (1 + tl.exp2(-1.4426950408889634 * z))


@triton.jit
def activated(u, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Of u [BM, BN]: [BM, BN / 2] for swiglu7, [BM, BN] for the others; not a number stays so."""
    NAN: tl.constexpr = tl.PropagateNan.ALL
    if KIND == "swiglu7":
        a, b = tl.split(tl.reshape(u, (BM, BN // 2, 2)))  # columns are interleaved: neighbours lie in one thread
        a = tl.minimum(a, 7.0, propagate_nan=NAN)
        y = a * sigmoid(1.702 * a) * (tl.clamp(b, -7.0, 7.0, propagate_nan=NAN) + 1)
    elif KIND == "gelu7":
        z = tl.minimum(u, 7.0, propagate_nan=NAN)
        y = z * sigmoid(1.702 * z)
    elif KIND == "gelu_tanh":  # 1 + tanh(z) = 2 sigmoid(2 z)
        y = u * sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    else:
        tl.static_assert(KIND == "silu")
        y = u * sigmoid(u)
    return y


@triton.jit
def finish(
    acc, x_scale, weight_scale, row, end, b_row, b_end, out, out_pitch, column, N: tl.constexpr, KIND: tl.constexpr,
    GAIN: tl.constexpr, STORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Scale, activate and write sums [BM, BN] of N columns, from the result's column `column` on, times GAIN."""
    HALVES: tl.constexpr = 2 if KIND == "swiglu7" else 1
    values = activated(scaled(acc, x_scale, weight_scale, row, end, b_row, b_end, BM, BN), KIND, BM, BN)
    if GAIN != 1:
        values *= GAIN
    store(out, out_pitch, row, end, column, N // HALVES, values, BM, BN // HALVES, STORE)


@triton.jit(do_not_specialize=ROWS)
def linear_activation_kernel(
    a, b, a_pitch, b_pitch, second, third, L, b_more, x_scale, weight_scale, out, out_more, out_pitch, N: tl.constexpr,
    K: tl.constexpr, EXPERTS: tl.constexpr, KIND: tl.constexpr, GAIN: tl.constexpr, STORE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    MORE: tl.constexpr = 0,
):  # fmt: skip
    WIDTH: tl.constexpr = BN + MORE
    FLAT: tl.constexpr = flat(b.dtype, TMA, MORE, EXPERTS)
    HALVES: tl.constexpr = 2 if KIND == "swiglu7" else 1
    columns = tl.cdiv(N, WIDTH)
    tiles = row_tiles(second, third, L, EXPERTS, BM) * columns
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
        row, end, expert, n = tile_at(tile, columns, second, third, L, EXPERTS, BM, GROUP)
        b_row, b_end, column = expert * N + n * WIDTH, expert * N + N, n * (WIDTH // HALVES)
        if MORE:
            acc, more = two_products(a, b, b_more, row, b_row, K, BM, BN, MORE, BK)
        else:
            acc = product(a, b, a_pitch, b_pitch, row, end, b_row, b_end, K, BM, BN, BK, TMA)
        finish(
            acc, x_scale, weight_scale, row, end, b_row, b_end, out, out_pitch, column, N, KIND, GAIN, STORE, BM, BN
        )  # fmt: skip
        if MORE:
            finish(
                more, x_scale, weight_scale, row, end, b_row + BN, b_end, out_more, out_pitch,
                column + BN // HALVES, N, KIND, GAIN, STORE, BM, MORE,
            )  # fmt: skip


CONFIGS = {
    "sm_90": (
        Config(8, 3, {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "TMA": 1}),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "TMA": 1}),
        Config(8, 3, {"BM": 128, "BN": 128, "BK": 128, "GROUP": 8, "TMA": 1, "MORE": 128}, "fp8"),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 128, "GROUP": 8, "TMA": 1, "MORE": 64}, "fp8"),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 128, "GROUP": 8, "TMA": 1}, "fp8"),
        Config(8, 3, {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "TMA": 1}, "w8a16"),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "TMA": 1}, "w8a16"),
    ),
    "sm_80": (
        Config(8, 4, {"BM": 128, "BN": 256, "BK": 32, "GROUP": 8, "TMA": 0}),
        Config(4, 4, {"BM": 128, "BN": 128, "BK": 32, "GROUP": 8, "TMA": 0}),
        Config(8, 4, {"BM": 128, "BN": 256, "BK": 32, "GROUP": 8, "TMA": 0}, "w8a16"),
        Config(8, 3, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "TMA": 0}, "w8a16"),
        Config(4, 4, {"BM": 128, "BN": 128, "BK": 32, "GROUP": 8, "TMA": 0}, "w8a16"),
    ),
}
CLAIMS = product_claims("linear_activation_kernel")


def supports(
    x: Tensor, weight: Tensor, experts: int, counts: Sequence[int], kind: str, dtype: torch.dtype,
    x_scale: Tensor | None = None, weight_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take these inputs, or None."""
    if kind == "gelu":
        return "its error function spills beside a tile of sums"
    if dtype == torch.float64:
        return "float64"
    return writes_no_codes(x, dtype) or refuses(x, weight, x_scale, weight_scale)


def run(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, weight: Tensor, experts: int, counts: Sequence[int],
    kind: str, dtype: torch.dtype, x_scale: Tensor | None = None, weight_scale: Tensor | None = None,
    config: Config | None = None,
) -> None:  # fmt: skip
    """Sums and activation in float32, one cast. Rows of x, weight and out may be padded to any pitch of 16 bytes."""
    config = config or default(CONFIGS, x, weight)
    cut, halves = config.constants, 2 if kind == "swiglu7" else 1
    more = cut.get("MORE", 0) if out[0].numel() else 0
    y, pitch, form = writable(out[0], experts, config, cut["BN"] // halves)
    launch_tiles(
        linear_activation_kernel,
        x,
        weight,
        experts,
        counts,
        weight_tile(x, weight, "MORE", config),
        x_scale,
        weight_scale,
        y,
        writable(out[0], experts, config, more // halves)[0] if more else None,
        pitch,
        config=config,
        KIND=kind,
        GAIN=FP8_GAINS[kind] if dtype == E4M3 else 1,
        STORE=form,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The up-projections of the DiT: both activations by modality, and the shared one."""
    counts = [4000, 100, 200]
    for experts, kind, width in ((1, "swiglu7", 27304), (3, "swiglu7", 27304), (3, "gelu7", 20480)):
        x, weight = (torch.empty(rows, 5120, dtype=torch.bfloat16, device="meta") for rows in (4300, experts * width))
        yield f"5120 x {width} {kind}, {experts} experts", (x, weight, experts, counts, kind, torch.bfloat16)
    for form, dtype in (("fp8", E4M3), ("w8a16", torch.bfloat16)):
        for experts, kind, width in ((1, "swiglu7", 27392), (3, "swiglu7", 27392), (3, "gelu7", 20480)):
            x, weight, *scales = codes(form, 5120, experts * width)
            yield (
                f"5120 x {width} {kind}, {experts} experts, {form}",
                (x, weight, experts, counts, kind, dtype, *scales),
            )
