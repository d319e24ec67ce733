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
    launch_tiles,
    product,
    refuses,
    row_tiles,
    store,
    tile_at,
    writable,
)


@triton.jit(do_not_specialize=ROWS)
def linear_kernel(
    a, b, a_pitch, b_pitch, second, third, L, out, out_pitch, N: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr,
    STORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(N, BN)
    tiles = row_tiles(second, third, L, EXPERTS, BM) * columns
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=TMA == 1):
        row, end, expert, n = tile_at(tile, columns, second, third, L, EXPERTS, BM, GROUP)
        b_row = expert * N + n * BN
        acc = product(a, b, a_pitch, b_pitch, row, end, b_row, expert * N + N, K, BM, BN, BK, TMA)
        store(out, out_pitch, row, end, n * BN, N, acc, BM, BN, STORE)


CONFIGS = {
    "sm_90": (
        Config(8, 3, {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "TMA": 1}),
        Config(8, 4, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "TMA": 1}),
    ),
    "sm_80": (
        Config(8, 4, {"BM": 128, "BN": 256, "BK": 32, "GROUP": 8, "TMA": 0}),
        Config(4, 4, {"BM": 128, "BN": 128, "BK": 32, "GROUP": 8, "TMA": 0}),
    ),
}
CLAIMS = {"sm_90": ("HGMMA", "UTMALDG"), "sm_80": ("HMMA", "LDGSTS")}


def supports(x: Tensor, weight: Tensor, experts: int, counts: Sequence[int]) -> str | None:
    """Why the kernel cannot take these inputs, or None."""
    return refuses(x, weight)


def run(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, weight: Tensor, experts: int, counts: Sequence[int],
    config: Config | None = None,
) -> None:  # fmt: skip
    """Sums in float32, one cast. Rows of x, weight and out may be padded to any pitch of 16 bytes."""
    config = config or default(CONFIGS, x)
    y, pitch, form = writable(out[0], experts, config, config.constants["BN"])
    launch_tiles(
        linear_kernel,
        x,
        weight,
        experts,
        counts,
        y,
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
