"""The up-projection by tiles; its activation on the float32 sums, before they leave the registers."""

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
    product_claims,
    refuses,
    row_tiles,
    store,
    tile_at,
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


@triton.jit(do_not_specialize=ROWS)
def linear_activation_kernel(
    a, b, a_pitch, b_pitch, second, third, L, out, out_pitch, N: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr,
    KIND: tl.constexpr, STORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    HALVES: tl.constexpr = 2 if KIND == "swiglu7" else 1
    columns = tl.cdiv(N, BN)
    tiles = row_tiles(second, third, L, EXPERTS, BM) * columns
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=TMA == 1):
        row, end, expert, n = tile_at(tile, columns, second, third, L, EXPERTS, BM, GROUP)
        b_row = expert * N + n * BN
        acc = product(a, b, a_pitch, b_pitch, row, end, b_row, expert * N + N, K, BM, BN, BK, TMA)
        values = activated(acc, KIND, BM, BN)
        store(out, out_pitch, row, end, n * (BN // HALVES), N // HALVES, values, BM, BN // HALVES, STORE)


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
CLAIMS = product_claims("linear_activation_kernel")


def supports(
    x: Tensor, weight: Tensor, experts: int, counts: Sequence[int], kind: str, dtype: torch.dtype
) -> str | None:
    """Why the kernel cannot take these inputs, or None."""
    if kind == "gelu":
        return "its error function spills beside a tile of sums"
    return "float64" if dtype == torch.float64 else refuses(x, weight)


def run(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, weight: Tensor, experts: int, counts: Sequence[int],
    kind: str, dtype: torch.dtype, config: Config | None = None,
) -> None:  # fmt: skip
    """Sums and activation in float32, one cast. Rows of x, weight and out may be padded to any pitch of 16 bytes."""
    config = config or default(CONFIGS, x)
    cut = config.constants
    y, pitch, form = writable(out[0], experts, config, cut["BN"] // (2 if kind == "swiglu7" else 1))
    launch_tiles(
        linear_activation_kernel,
        x,
        weight,
        experts,
        counts,
        y,
        pitch,
        config=config,
        KIND=kind,
        STORE=form,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The up-projections of the DiT: both activations by modality, and the shared one."""
    for experts, kind, width in ((1, "swiglu7", 27304), (3, "swiglu7", 27304), (3, "gelu7", 20480)):
        x, weight = (torch.empty(rows, 5120, dtype=torch.bfloat16, device="meta") for rows in (4300, experts * width))
        yield f"5120 x {width} {kind}, {experts} experts", (x, weight, experts, [4000, 100, 200], kind, torch.bfloat16)
