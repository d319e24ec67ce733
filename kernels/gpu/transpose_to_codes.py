"""Values of attention in eight bits, turned: some tokens of one head a program, through shared memory."""

from collections.abc import Iterator
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu.launch import Config, default, launch, writes_no_codes
from horsepower.kernels.transpose_to_codes import MULTIPLE


@triton.jit(do_not_specialize=["L", "chunks"])
def transpose_to_codes_kernel(
    x, inverse, codes, L, chunks, row_units, head_units, UNIT: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, WIDTH)
    x += head.to(tl.int64) * (head_units * UNIT)  # so that Triton knows how wide loads may be
    at = x + (token.to(tl.int64) * (row_units * UNIT))[:, None] + column[None, :]
    v = tl.load(at, mask=(token < L)[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
    made = tl.trans((v * tl.load(inverse)).to(tl.float8e4nv))
    place = codes + (head.to(tl.int64) * D + column[:, None]) * (chunks * CHUNK) + token[None, :]
    tl.store(place, made, mask=(column < D)[:, None] & (token < chunks * CHUNK)[None, :])


CONFIGS = {"sm_90": (Config(4, constants={"TOKENS": 128}),), "sm_80": ()}  # predicted: 128 bytes of each row at once
CLAIMS = {"sm_90": {"transpose_to_codes_kernel": ("LDG.E.128", "STG.E.128", "F2FP.SATFINITE.E4M3")}}


def supports(x: Tensor, inverse: Tensor) -> str | None:
    """Why the kernel cannot take these inputs, or None."""
    if x.dtype == torch.float64:
        return "float64"
    if not 1 <= x.shape[2] <= 256:
        return f"a head has {x.shape[2]} dimensions, allowed: up to 256"
    return writes_no_codes(x, E4M3) or ("the last dimension is not contiguous" if x.stride(2) != 1 else None)


def run(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, inverse: Tensor, config: Config | None = None
) -> None:  # fmt: skip
    """In float32. Rows and heads may have any strides."""
    config = config or default(CONFIGS, x)
    L, H, D = x.shape
    unit = gcd(x.stride(0), x.stride(1), 16 // x.itemsize)
    launch(
        transpose_to_codes_kernel,
        (triton.cdiv(L, config.constants["TOKENS"]), H),
        x,
        inverse,
        out[0],
        L,
        out[0].shape[2] // MULTIPLE,
        x.stride(0) // unit,
        x.stride(1) // unit,
        UNIT=unit,
        CHUNK=MULTIPLE,
        D=D,
        WIDTH=triton.next_power_of_2(D),
        config=config,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The values of the DiT, columns of its projection; narrower heads."""
    for D in (128, 64):
        rest = torch.empty(4300, 8 * D + 48, dtype=torch.bfloat16, device="meta")
        yield f"heads of {D}", (rest[:, : 8 * D].unflatten(1, (8, D)), torch.empty(1, device="meta"))
