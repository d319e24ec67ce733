"""RMS norm that leaves in eight bits: a row stays in registers through both of its reductions."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu.launch import Config, default, launch, writes_no_codes
from horsepower.kernels.gpu.rows import WIDEST, gain_of, places, refuses, step, store_codes, tile
from horsepower.kernels.modality import first_rows


@triton.jit(do_not_specialize=["steps", "second", "third", "L"])
def rms_norm_quantise_kernel(
    x, gain, codes, scales, steps, second, third, L, eps, EXPERTS: tl.constexpr, STEP: tl.constexpr,
    TILE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, column = places(ROWS, BLOCK, VECTOR)
    inside = (row < L) & (column < C)
    v = tl.load(x + row * steps * STEP + column, mask=inside, other=0.0).to(tl.float32)
    v *= tl.rsqrt(tl.sum(v * v, axis=1, keep_dims=True) / C + eps)
    if EXPERTS > 0:
        v *= gain_of(gain, row, column, inside, second, third, C, EXPERTS)
    store_codes(codes, scales, row, column, L, C, v)


CONFIGS = {"sm_90": (Config(warps=8, constants={"TILE": 4096}),), "sm_80": ()}  # predicted, as of add_rms_norm
CLAIMS = {"sm_90": {"rms_norm_quantise_kernel": ("LDG.E.128", "F2FP.SATFINITE.E4M3", "REDUX")}}


def supports(x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int], eps: float) -> str | None:
    """Why the kernel cannot take these inputs, or None."""
    if x.shape[1] > WIDEST:
        return "a row does not fit into registers"
    if not x.shape[1]:
        return "there are no columns"
    return writes_no_codes(x, E4M3) or refuses(x, gain)


def run(
    out: tuple[Tensor, Tensor], _workspace: None, x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int],
    eps: float, config: Config | None = None,
) -> None:  # fmt: skip
    """A tile of whole rows a program, in float32."""
    if not x.numel():
        return
    L, C = x.shape
    config = config or default(CONFIGS, x)
    cut, unit = tile(C, config, x), step(x)
    launch(
        rms_norm_quantise_kernel,
        (triton.cdiv(L, cut["ROWS"]),),
        x,
        x if gain is None else gain,
        *out,
        x.stride(0) // unit,
        *first_rows(experts == 3, counts, L),
        L,
        eps,
        EXPERTS=0 if gain is None else experts,
        STEP=unit,
        **cut,
        config=config,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The norms of the DiT: gains shared or of each modality; narrower rows, several of them a program."""
    for dtype in (torch.bfloat16, torch.float32):
        for C, experts in ((5120, 1), (5120, 3), (1024, 3)):
            x, gain = torch.empty(4300, C, dtype=dtype, device="meta"), torch.empty(experts * C, device="meta")
            yield f"{C} columns, {dtype}, {experts} experts", (x, gain, experts, [4000, 100, 200], 1e-6)
