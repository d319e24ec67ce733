"""Layer norm and cast, whole rows a program: read once, mean and variance from registers, written once."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.gpu.launch import Config, default, launch
from horsepower.kernels.gpu.rows import WIDEST, places, refuses, shared_row, step, tile
from horsepower.kernels.native_library import pitch
from horsepower.kernels.target import GPUS


@triton.jit(do_not_specialize=["steps", "L"])
def layer_norm_kernel(
    x, weight, bias, out, steps, L, eps, WEIGHT: tl.constexpr, BIAS: tl.constexpr, STEP: tl.constexpr,
    TILE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, column = places(ROWS, BLOCK, VECTOR)
    inside = (row < L) & (column < C)
    v = tl.load(x + row * steps * STEP + column, mask=inside, other=0.0).to(tl.float32)
    for _ in tl.static_range(2):  # what the mean was rounded by is the mean of the differences from it
        v = tl.where(column < C, v - tl.sum(v, axis=1, keep_dims=True) / C, 0.0)
    v *= tl.rsqrt(tl.sum(v * v, axis=1, keep_dims=True) / C + eps)
    if WEIGHT:
        v *= shared_row(weight, column, column < C)
    if BIAS:
        v += shared_row(bias, column, column < C)
    tl.store(out + row * C + column, v.to(out.dtype.element_ty), mask=inside)


CONFIGS = {arch: (Config(warps=8, constants={"TILE": 4096}),) for arch in GPUS}  # predicted, as of add_rms_norm
# 64: bfloat16 from float32
CLAIMS = {arch: {"layer_norm_kernel": ("LDG.E.128", "STG.E.128|STG.E.64")} for arch in GPUS}


def supports(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot take these inputs, or None."""
    if x.shape[-1] > WIDEST:
        return "a row does not fit into registers"
    return "float64" if dtype == torch.float64 else refuses(x, weight, bias)


def run(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    dtype: torch.dtype, config: Config | None = None,
) -> None:  # fmt: skip
    """A tile of whole rows a program; sums in float32."""
    if not x.numel():
        return
    C = x.shape[-1]
    config = config or default(CONFIGS, x)
    cut, unit = tile(C, config, x, *out), step(x)
    launch(
        layer_norm_kernel,
        (triton.cdiv(x.numel() // C, cut["ROWS"]),),
        x,
        x if weight is None else weight,
        x if bias is None else bias,
        out[0],
        (pitch(x) or 0) // unit,
        x.numel() // C,
        eps,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        STEP=unit,
        **cut,
        config=config,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """As wide as the DiT, with a weight and a bias and without."""
    own = torch.empty(5120, device="meta")
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(4300, 5120, dtype=dtype, device="meta")
        yield f"{dtype}", (x, own, own, 1e-6, torch.bfloat16)
        yield f"{dtype}, neither weight nor bias", (x, None, None, 1e-6, torch.bfloat16)
