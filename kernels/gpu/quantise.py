"""Rows in eight bits, whole rows a program: read once, written once."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu.launch import Config, default, launch, writes_no_codes
from horsepower.kernels.gpu.rows import WIDEST, places, refuses, step, store_codes, tile


@triton.jit(do_not_specialize=["steps", "L"])
def quantise_kernel(
    x, codes, scales, steps, L, STEP: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, column = places(ROWS, BLOCK, VECTOR)
    v = tl.load(x + row * steps * STEP + column, mask=(row < L) & (column < C), other=0.0).to(tl.float32)
    store_codes(codes, scales, row, column, L, C, v)


CONFIGS = {"sm_90": (Config(warps=8, constants={"TILE": 4096}),), "sm_80": ()}  # predicted, as of add_rms_norm
CLAIMS = {"sm_90": {"quantise_kernel": ("LDG.E.128", "F2FP.SATFINITE.E4M3", "REDUX")}}


def supports(x: Tensor) -> str | None:
    """Why the kernel cannot take these inputs, or None."""
    if x.shape[1] > WIDEST:
        return "a row does not fit into registers"
    if not x.shape[1]:
        return "there are no columns"
    return writes_no_codes(x, E4M3) or refuses(x)


def run(out: tuple[Tensor, Tensor], _workspace: None, x: Tensor, config: Config | None = None) -> None:
    """A tile of whole rows a program, in float32."""
    if not x.numel():
        return
    L, C = x.shape
    config = config or default(CONFIGS, x)
    cut, unit = tile(C, config, x), step(x)
    launch(
        quantise_kernel,
        (triton.cdiv(L, cut["ROWS"]),),
        x,
        *out,
        x.stride(0) // unit,
        L,
        STEP=unit,
        **cut,
        config=config,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The inputs of the DiT's projections; narrow rows, several of them a program."""
    for C, dtype in ((5120, torch.bfloat16), (13696, torch.bfloat16), (5120, torch.float32), (1024, torch.bfloat16)):
        yield f"{C} columns, {dtype}", (torch.empty(4300, C, dtype=dtype, device="meta"),)
