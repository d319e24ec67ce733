"""A branch's last projection by tiles, which add the residual and sum squares; a second kernel norms the rows.

Where a row's sum of squares comes from many tiles, each writes its part: sums in a fixed order, and no atomics.
"""

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.gpu.launch import Config, default, launch, writes_no_codes
from horsepower.kernels.gpu.tiles import (
    ROWS,
    codes,
    descriptor,
    flat,
    halves,
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
    writable,
)
from horsepower.kernels.linear_add_rms_norm import SQUARES_COLUMNS
from horsepower.kernels.modality import first_rows


@triton.jit
def added(
    branch, x_scale, weight_scale, residual, residual_pitch, out, out_pitch, row, end, expert, column,
    N: tl.constexpr, COVERED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    STORE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write branch, scaled, + residual [BM, BN]; its sums of squares [BM]. COVERED: no tile goes beyond the columns."""
    at = column + tl.arange(0, BN)
    branch = scaled(branch, x_scale, weight_scale, row, end, expert * N + column, expert * N + N, BM, BN)
    if TMA:  # a pointer would spill
        total = branch + residual.load([row, column]).to(tl.float32)
    else:
        rows = tl.arange(0, BM)
        pitch = residual_pitch * UNIT
        first = residual + row.to(tl.int64) * pitch + (rows[:, None] * pitch + at[None, :])
        inside = (row + rows < end)[:, None] & (at < N)[None, :]
        total = branch + tl.load(first, mask=inside, other=0.0).to(tl.float32)
    store(out, out_pitch, row, end, column, N, total, BM, BN, STORE)
    if not COVERED:
        total = tl.where((at < N)[None, :], total, 0.0)
    return tl.sum(total * total, axis=1)


@triton.jit(do_not_specialize=ROWS)
def linear_add_kernel(
    a, b, a_pitch, b_pitch, second, third, L, b_more, x_scale, weight_scale, residual, residual_pitch, out, out_pitch,
    squares, N: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, UNIT: tl.constexpr, STORE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    PARTS: tl.constexpr, MORE: tl.constexpr = 0,
):  # fmt: skip
    """squares: None where nobody asks for them."""
    WIDTH: tl.constexpr = BN // PARTS  # shared memory has no room for a whole tile of residuals
    COLUMNS: tl.constexpr = BN + MORE
    FLAT: tl.constexpr = flat(b.dtype, TMA, MORE, EXPERTS)
    tl.static_assert(MORE % WIDTH == 0)
    columns = tl.cdiv(N, COLUMNS)
    tiles = row_tiles(second, third, L, EXPERTS, BM) * columns
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
        row, end, expert, n = tile_at(tile, columns, second, third, L, EXPERTS, BM, GROUP)
        b_row = expert * N + n * COLUMNS
        if MORE:
            acc, more = two_products(a, b, b_more, row, b_row, K, BM, BN, MORE, BK)
            left, right = halves(acc, BM, BN)
            parts = (left, right, more)
            if MORE > WIDTH:
                more_left, more_right = halves(more, BM, MORE)
                parts = (left, right, more_left, more_right)  # type: ignore[assignment]
        else:
            acc = product(a, b, a_pitch, b_pitch, row, end, b_row, expert * N + N, K, BM, BN, BK, TMA)
            left, right = halves(acc, BM, BN)
            parts = (left, right)  # type: ignore[assignment]
            if PARTS == 4:
                left, left_right = halves(left, BM, BN // 2)
                right, right_right = halves(right, BM, BN // 2)
                parts = (left, left_right, right, right_right)  # type: ignore[assignment]
        sums = tl.zeros((BM,), tl.float32)
        for i in tl.static_range(COLUMNS // WIDTH):
            column = n * COLUMNS + i * WIDTH
            sums += added(
                parts[i], x_scale, weight_scale, residual, residual_pitch, out, out_pitch, row, end, expert, column, N,
                N % COLUMNS == 0, BM, WIDTH, UNIT, STORE, TMA,
            )  # fmt: skip
        if squares is not None:
            rows = tl.arange(0, BM)
            tl.store(squares + row.to(tl.int64) * columns + rows * columns + n, sums, mask=row + rows < end)


@triton.jit(do_not_specialize=("second", "third"))
def norm_kernel(
    total, squares, gain, out, second, third, eps, C: tl.constexpr, PITCH: tl.constexpr, OUT_PITCH: tl.constexpr,
    TILES: tl.constexpr, MANY: tl.constexpr, GAINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < C
    tile = tl.arange(0, MANY)
    sums = tl.load(squares + row * TILES + tile, mask=tile < TILES, other=0.0)
    if GAINS > 1:
        gain += ((row >= second).to(tl.int32) + (row >= third).to(tl.int32)) * C
    v = tl.load(total + row * PITCH + column, mask=inside, other=0.0).to(tl.float32)
    v *= tl.rsqrt(tl.sum(sums) / C + eps) * tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * OUT_PITCH + column, v.to(out.dtype.element_ty), mask=inside)


NORM = Config(4, 1, {"BLOCK": 1024})
CONFIGS = {
    "sm_90": (
        Config(8, 3, {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "TMA": 1, "PARTS": 4}),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "TMA": 1, "PARTS": 2, "MORE": 64}),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "TMA": 1, "PARTS": 2}),
        Config(8, 3, {"BM": 128, "BN": 128, "BK": 128, "GROUP": 8, "TMA": 1, "PARTS": 2, "MORE": 128}, "fp8"),
        Config(8, 3, {"BM": 128, "BN": 128, "BK": 128, "GROUP": 8, "TMA": 1, "PARTS": 2, "MORE": 64}, "fp8"),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 128, "GROUP": 8, "TMA": 1, "PARTS": 2}, "fp8"),
        Config(8, 3, {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "TMA": 1, "PARTS": 4}, "w8a16"),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "TMA": 1, "PARTS": 2}, "w8a16"),
    ),
    "sm_80": (  # 128 x 256 spills
        Config(8, 4, {"BM": 256, "BN": 128, "BK": 32, "GROUP": 8, "TMA": 0, "PARTS": 4}),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 32, "GROUP": 8, "TMA": 0, "PARTS": 4}),
        Config(8, 4, {"BM": 256, "BN": 128, "BK": 32, "GROUP": 8, "TMA": 0, "PARTS": 4}, "w8a16"),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 32, "GROUP": 8, "TMA": 0, "PARTS": 4}, "w8a16"),
        Config(8, 3, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "TMA": 0, "PARTS": 4}, "w8a16"),
    ),
}
CLAIMS = product_claims("linear_add_kernel", norm_kernel=("MUFU.RSQ",))


def supports(
    x: Tensor, weight: Tensor, experts: int, residual: Tensor, post_gain: Tensor | None, gain: Tensor,
    counts: Sequence[int], eps: float, dtype: torch.dtype, x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take these inputs, or None."""
    if post_gain is not None:
        return "the branch is normed before it is added, and no tile has all of a row"
    if torch.float64 in (residual.dtype, gain.dtype, dtype):
        return "float64"
    if not pitched(residual) or gain.stride(0) != 1:
        return "residual or gain cannot be read as they lie"
    return writes_no_codes(x, dtype) or refuses(x, weight, x_scale, weight_scale)


def add_branch(
    total: Tensor, workspace: Tensor | None, x: Tensor, weight: Tensor, experts: int, residual: Tensor,
    counts: Sequence[int], x_scale: Tensor | None, weight_scale: Tensor | None, config: Config,
) -> Tensor | None:  # fmt: skip
    """Write x weight^T + residual [L, C]; returns the sums of squares [L, tiles], which lie in the workspace if any."""
    L, C = residual.shape
    cut = config.constants
    assert cut["BN"] >= SQUARES_COLUMNS
    width = cut["BN"] // cut["PARTS"]
    tiles = triton.cdiv(C, cut["BN"] + cut.get("MORE", 0))
    squares = None if workspace is None else workspace[: L * tiles * 4].view(torch.float32).view(L, tiles)
    unit = gcd(residual.stride(0), 8)
    target, pitch, form = writable(total, experts, config, width)
    launch_tiles(
        linear_add_kernel,
        x,
        weight,
        experts,
        counts,
        weight_tile(x, weight, "MORE", config),
        x_scale,
        weight_scale,
        descriptor(residual, cut["BM"], width) if cut["TMA"] else residual,
        residual.stride(0) // unit,
        target,
        pitch,
        squares,
        config=config,
        UNIT=unit,
        STORE=form,
    )
    return squares


def run(
    out: tuple[Tensor, Tensor], workspace: Tensor | None, x: Tensor, weight: Tensor, experts: int, residual: Tensor,
    post_gain: Tensor | None, gain: Tensor, counts: Sequence[int], eps: float, dtype: torch.dtype,
    x_scale: Tensor | None = None, weight_scale: Tensor | None = None, config: Config | None = None,
) -> None:  # fmt: skip
    """Two kernels; sums and norm in float32. Rows of x, weight, residual and the results may be padded."""
    total, normed = out
    L, C = residual.shape
    if not residual.numel():
        return
    config = config or default(CONFIGS, x, weight)
    squares = add_branch(total, workspace, x, weight, experts, residual, counts, x_scale, weight_scale, config)
    assert squares is not None
    gains = gain.shape[0] // C
    launch(
        norm_kernel,
        (L, triton.cdiv(C, NORM.constants["BLOCK"])),
        total,
        squares,
        gain,
        normed,
        *first_rows(gains == 3, counts, L),
        eps,
        C=C,
        PITCH=total.stride(0),
        OUT_PITCH=normed.stride(0),
        TILES=squares.shape[1],
        MANY=triton.next_power_of_2(squares.shape[1]),
        GAINS=gains,
        config=NORM,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The projections that end the DiT's branches: of the attention, and of the MLP with its padded rows."""
    counts = [4000, 100, 200]
    for experts, width in ((1, 5120), (1, 13652), (3, 13652), (3, 20480)):
        x, weight = (
            torch.empty(rows, triton.cdiv(width, 128) * 128, dtype=torch.bfloat16, device="meta")[:, :width]
            for rows in (4300, experts * 5120)
        )
        residual, gain = torch.empty(4300, 5120, device="meta"), torch.empty(experts * 5120, device="meta")
        inputs = (x, weight, experts, residual, None, gain, counts, 1e-6, torch.bfloat16)
        yield f"{width} x 5120, {experts} experts", (*inputs, None, None)
    for form in ("fp8", "w8a16"):
        for experts, width in ((1, 5120), (1, 13696), (3, 20480)):
            x, weight, *scales = codes(form, width, experts * 5120)
            residual, gain = torch.empty(4300, 5120, device="meta"), torch.empty(experts * 5120, device="meta")
            inputs = (x, weight, experts, residual, None, gain, counts, 1e-6, torch.bfloat16)
            yield f"{width} x 5120, {experts} experts, {form}", (*inputs, *scales)
