"""Rows in eight bits with a scale that is known beforehand, in one pass."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu.elementwise import cut, piece
from horsepower.kernels.gpu.launch import Config, default, launch, writes_no_codes
from horsepower.kernels.gpu.rows import refuses


@triton.jit(do_not_specialize=["start", "step", "vectors", "pieces"])
def to_codes_kernel(
    x, start, step, out, vectors, pieces, inverse, BLOCK: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, first, left = piece(vectors, pieces, BLOCK, VECTOR)
    column = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    inside = column < left
    v = tl.load(x + ((start + row * step) * VECTOR + first) + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (row * vectors * VECTOR + first) + column, (v * inverse).to(tl.float8e4nv), mask=inside)


CONFIGS = {"sm_90": (Config(warps=4, constants={"TILE": 4096}),), "sm_80": ()}  # predicted, as of activation
CLAIMS = {"sm_90": {"to_codes_kernel": ("LDG.E.128", "STG.E.128|STG.E.64", "F2FP.SATFINITE.E4M3")}}


def supports(x: Tensor, inverse: float) -> str | None:
    """Why the kernel cannot take these inputs, or None."""
    return "float64" if x.dtype == torch.float64 else writes_no_codes(x, E4M3) or refuses(x)


def run(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, inverse: float, config: Config | None = None
) -> None:  # fmt: skip
    """A piece of a row a program, in float32."""
    if not x.numel():
        return
    config = config or default(CONFIGS, x)
    way = cut(config, out[0], x)
    launch(
        to_codes_kernel,
        way.grid,
        *way.inputs[0],
        out[0],
        way.vectors,
        way.pieces,
        inverse,
        BLOCK=way.block,
        VECTOR=way.vector,
        config=config,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The inputs of the DiT's projections; columns of wider rows."""
    for C in (5120, 13696):
        yield f"{C} columns", (torch.empty(4300, C, dtype=torch.bfloat16, device="meta"), 8.0)
    yield "strided rows", (torch.empty(4300, 7296, dtype=torch.bfloat16, device="meta")[:, :5120], 8.0)
