"""Activations and the cast that follows, in one pass; the interleaved columns of swiglu7 are parted in registers."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.activation import FP8_GAINS
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu.elementwise import cut, gated, piece
from horsepower.kernels.gpu.launch import Config, default, launch, writes_no_codes
from horsepower.kernels.gpu.rows import refuses
from horsepower.kernels.target import GPUS

KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["start", "step", "vectors", "pieces"])
def activation_kernel(
    u, start, step, out, vectors, pieces, KIND: tl.constexpr, GAIN: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, first, left = piece(vectors, pieces, BLOCK, VECTOR)
    column = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    u += (start + row * step) * VECTOR + first
    z = tl.load(u + column, mask=column < left, other=0.0).to(tl.float32)
    to = row * vectors * VECTOR + first
    if KIND == "swiglu7":
        z, linear = tl.split(tl.reshape(z, (BLOCK // 2, 2)))
        linear = tl.minimum(tl.maximum(linear, -7.0, KEEP_NAN), 7.0, KEEP_NAN)
        z = gated(tl.minimum(z, 7.0, KEEP_NAN), 1.702) * (linear + 1)
        if GAIN != 1:
            z *= GAIN
        made = tl.max_contiguous(tl.arange(0, BLOCK // 2), (VECTOR + 1) // 2)
        tl.store(out + to // 2 + made, z.to(out.dtype.element_ty), mask=made < left // 2)
    else:
        if KIND == "gelu7":
            z = gated(tl.minimum(z, 7.0, KEEP_NAN), 1.702)
            if GAIN != 1:
                z *= GAIN
        elif KIND == "gelu":
            z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
        elif KIND == "gelu_tanh":
            z = z / (1 + tl.exp2((z + 0.044715 * z * z * z) * -2.302208198144325))  # 2 sqrt(2 / pi) log2(e)
        else:
            z = gated(z, 1.0)
        tl.store(out + to + column, z.to(out.dtype.element_ty), mask=column < left)


# predicted: four 16-byte loads in flight a thread, at 32 registers, which leave room for every thread that fits
CONFIGS = {arch: (Config(warps=4, constants={"TILE": 4096}),) for arch in GPUS}
CLAIMS = {arch: {"activation_kernel": ("LDG.E.128", "STG.E.128|STG.E.64|F2FP.SATFINITE.E4M3")} for arch in GPUS}


def supports(u: Tensor, kind: str, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot take these inputs, or None."""
    return "float64" if dtype == torch.float64 else writes_no_codes(u, dtype) or refuses(u)


def run(
    out: tuple[Tensor, ...], _workspace: None, u: Tensor, kind: str, dtype: torch.dtype, config: Config | None = None
) -> None:
    """A piece of a row a program, computed in float32."""
    if not u.numel():
        return
    config = config or default(CONFIGS, u)
    way = cut(config, out[0], u, ratio=2 if kind == "swiglu7" else 1)
    launch(
        activation_kernel,
        way.grid,
        *way.inputs[0],
        out[0],
        way.vectors,
        way.pieces,
        KIND=kind,
        GAIN=FP8_GAINS[kind] if dtype == E4M3 else 1,
        BLOCK=way.block,
        VECTOR=way.vector,
        config=config,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The activations of the DiT's MLPs, and of other transformers."""
    for label, columns in (("", 27304), (", strided rows", 27312)):
        up = torch.empty(4300, columns, dtype=torch.bfloat16, device="meta")[:, :27304]
        yield f"swiglu7{label}", (up, "swiglu7", torch.bfloat16)
    for kind in ("gelu7", "gelu", "gelu_tanh", "silu"):
        yield kind, (torch.empty(4300, 20480, dtype=torch.bfloat16, device="meta"), kind, torch.bfloat16)
    for kind, columns in (("swiglu7", 27392), ("gelu7", 20480)):
        yield f"{kind} into codes", (torch.empty(4300, columns, dtype=torch.bfloat16, device="meta"), kind, E4M3)
