"""RMS norm and cast, whole rows a program: read once, written once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.gpu.launch import Config, default, launch
from horsepower.kernels.gpu.rows import WIDEST, gain_of, places, refuses, step, tile
from horsepower.kernels.modality import first_rows
from horsepower.kernels.native_library import pitch
from horsepower.kernels.target import GPUS


@triton.jit(do_not_specialize=["steps", "second", "third", "L"])
def rms_norm_kernel(
    x, gain, out, steps, second, third, L, eps, EXPERTS: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, column = places(ROWS, BLOCK, VECTOR)
    inside = (row < L) & (column < C)
    v = tl.load(x + row * steps * STEP + column, mask=inside, other=0.0).to(tl.float32)
    v *= tl.rsqrt(tl.sum(v * v, axis=1, keep_dims=True) / C + eps)
    if EXPERTS > 0:
        v *= gain_of(gain, row, column, inside, second, third, C, EXPERTS)
    tl.store(out + row * C + column, v.to(out.dtype.element_ty), mask=inside)


CONFIGS = {arch: (Config(warps=8, constants={"TILE": 4096}),) for arch in GPUS}  # predicted, as of add_rms_norm
# 64: bfloat16 from float32
CLAIMS = {arch: {"rms_norm_kernel": ("LDG.E.128", "STG.E.128|STG.E.64")} for arch in GPUS}


def supports(
    x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int], eps: float, dtype: torch.dtype
) -> str | None:
    """Why the kernel cannot take these inputs, or None."""
    if experts != 1 and x.ndim != 2:
        return f"x has {x.ndim} dimensions"
    if x.shape[-1] > WIDEST:
        return "a row does not fit into registers"
    return "float64" if dtype == torch.float64 else refuses(x, gain)


def run(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int],
    eps: float, dtype: torch.dtype, config: Config | None = None,
) -> None:  # fmt: skip
    """A tile of whole rows a program; sums in float32."""
    start(rms_norm_kernel, out, x, gain, experts, counts, eps, config or default(CONFIGS, x))


def start(
    kernel: Any, out: tuple[Tensor, ...], x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int],
    eps: float, config: Config,
) -> None:  # fmt: skip
    """Launch `kernel(x, gain, *out, ...)`, `out` what is made of the normed rows."""
    if not x.numel():
        return
    C = x.shape[-1]
    L = x.numel() // C
    cut, unit = tile(C, config, x, out[0]), step(x)
    launch(
        kernel,
        (triton.cdiv(L, cut["ROWS"]),),
        x,
        x if gain is None else gain,
        *out,
        (pitch(x) or 0) // unit,
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
            x = torch.empty(4300, C, dtype=dtype, device="meta")
            gain = torch.empty(experts * C, device="meta")
            yield f"{C} columns, {dtype}, {experts} experts", (x, gain, experts, [4000, 100, 200], 1e-6, torch.bfloat16)
