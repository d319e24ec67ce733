"""Matrix product by tiles, of all modalities in one launch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.gpu.launch import Config, default
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


@triton.jit(do_not_specialize=ROWS)
def linear_kernel(
    a, b, a_pitch, b_pitch, second, third, L, b_more, x_scale, weight_scale, out, out_more, out_pitch, N: tl.constexpr,
    K: tl.constexpr, EXPERTS: tl.constexpr, STORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, MORE: tl.constexpr = 0,
):  # fmt: skip
    WIDTH: tl.constexpr = BN + MORE
    FLAT: tl.constexpr = flat(b.dtype, TMA, MORE, EXPERTS)
    columns = tl.cdiv(N, WIDTH)
    tiles = row_tiles(second, third, L, EXPERTS, BM) * columns
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
        row, end, expert, n = tile_at(tile, columns, second, third, L, EXPERTS, BM, GROUP)
        b_row, b_end = expert * N + n * WIDTH, expert * N + N
        if MORE:
            acc, more = two_products(a, b, b_more, row, b_row, K, BM, BN, MORE, BK)
            more = scaled(more, x_scale, weight_scale, row, end, b_row + BN, b_end, BM, MORE)
            store(out_more, out_pitch, row, end, n * WIDTH + BN, N, more, BM, MORE, STORE)
        else:
            acc = product(a, b, a_pitch, b_pitch, row, end, b_row, b_end, K, BM, BN, BK, TMA)
        acc = scaled(acc, x_scale, weight_scale, row, end, b_row, b_end, BM, BN)
        store(out, out_pitch, row, end, n * WIDTH, N, acc, BM, BN, STORE)


CONFIGS = {
    "sm_90": (
        Config(8, 3, {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "TMA": 1}),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "TMA": 1, "MORE": 64}),
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
CLAIMS = product_claims("linear_kernel")


def supports(
    x: Tensor, weight: Tensor, experts: int, counts: Sequence[int], x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take these inputs, or None."""
    return refuses(x, weight, x_scale, weight_scale)


def run(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, weight: Tensor, experts: int, counts: Sequence[int],
    x_scale: Tensor | None = None, weight_scale: Tensor | None = None, config: Config | None = None,
) -> None:  # fmt: skip
    """Sums in float32, one cast. Rows of x, weight and out may be padded to any pitch of 16 bytes."""
    config = config or default(CONFIGS, x, weight)
    more = config.constants.get("MORE", 0) if out[0].numel() else 0
    y, pitch, form = writable(out[0], experts, config, config.constants["BN"])
    launch_tiles(
        linear_kernel,
        x,
        weight,
        experts,
        counts,
        weight_tile(x, weight, "MORE", config),
        x_scale,
        weight_scale,
        y,
        writable(out[0], experts, config, more)[0] if more else None,
        pitch,
        config=config,
        STORE=form,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The down-projection of the DiT, whose rows are padded, shared and by modality; one whose rows need no padding."""
    for experts, width in ((1, 13652), (3, 13652), (1, 5120)):
        x, weight = (
            torch.empty(rows, triton.cdiv(width, 128) * 128, dtype=torch.bfloat16, device="meta")[:, :width]
            for rows in (4300, experts * 5120)
        )
        yield f"{width} x 5120, {experts} experts", (x, weight, experts, [4000, 100, 200])
    for form in ("fp8", "w8a16"):
        for experts in (1, 3):
            x, weight, *scales = codes(form, 13696, experts * 5120)
            yield f"13696 x 5120, {experts} experts, {form}", (x, weight, experts, [4000, 100, 200], *scales)
