"""The gated SiLU of two tensors and the cast that follows, in one pass."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.gpu.elementwise import cut, gated, piece
from horsepower.kernels.gpu.launch import Config, default, launch
from horsepower.kernels.gpu.rows import refuses
from horsepower.kernels.target import GPUS


@triton.jit(do_not_specialize=["gate_start", "gate_step", "up_start", "up_step", "vectors", "pieces"])
def silu_mul_kernel(
    gate, gate_start, gate_step, up, up_start, up_step, out, vectors, pieces, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, first, left = piece(vectors, pieces, BLOCK, VECTOR)
    column = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    inside = column < left
    gate += (gate_start + row * gate_step) * VECTOR + first
    up += (up_start + row * up_step) * VECTOR + first
    g = tl.load(gate + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + column, mask=inside, other=0.0).to(tl.float32)
    out += row * vectors * VECTOR + first
    tl.store(out + column, (gated(g, 1.0) * u).to(out.dtype.element_ty), mask=inside)


# predicted: four 16-byte loads in flight a thread, at 32 registers, which leave room for every thread that fits
CONFIGS = {arch: (Config(warps=4, constants={"TILE": 2048}),) for arch in GPUS}
# 64: where rows are not better aligned
CLAIMS = {arch: {"silu_mul_kernel": ("LDG.E.128|LDG.E.64", "STG.E.128|STG.E.64")} for arch in GPUS}


def supports(gate: Tensor, up: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot take these inputs, or None."""
    return "float64" if dtype == torch.float64 else refuses(gate, up)


def run(
    out: tuple[Tensor, ...],
    _workspace: None,
    gate: Tensor,
    up: Tensor,
    dtype: torch.dtype,
    config: Config | None = None,
) -> None:
    """A piece of a row a program, computed in float32."""
    if not gate.numel():
        return
    config = config or default(CONFIGS, gate)
    way = cut(config, out[0], gate, up)
    launch(
        silu_mul_kernel,
        way.grid,
        *way.inputs[0],
        *way.inputs[1],
        out[0],
        way.vectors,
        way.pieces,
        BLOCK=way.block,
        VECTOR=way.vector,
        config=config,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Two projections, and the halves of one whose width is odd."""
    gate = torch.empty(4300, 13652, dtype=torch.bfloat16, device="meta")
    yield "two tensors", (gate, gate, torch.bfloat16)
    both = torch.empty(4300, 27304, dtype=torch.bfloat16, device="meta")
    yield "two halves", (*both.chunk(2, dim=-1), torch.bfloat16)
