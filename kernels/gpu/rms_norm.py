"""RMS norm and cast, a row a program: read once, written once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.gpu.launch import Config, default, launch
from horsepower.kernels.modality import first_rows
from horsepower.kernels.native_library import pitch


@triton.jit
def rms_norm_kernel(
    x, gain, out, pitch, second, third, C, eps, GAIN: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < C
    v = tl.load(x + row * pitch + column, mask=inside, other=0.0).to(tl.float32)
    v *= tl.rsqrt(tl.sum(v * v) / C + eps)
    if GAIN:
        if EXPERTS > 1:
            gain += ((row >= second).to(tl.int32) + (row >= third).to(tl.int32)) * C
        v *= tl.load(gain + column, mask=inside, other=0.0)
    tl.store(out + row * C + column, v.to(out.dtype.element_ty), mask=inside)


CONFIGS = {"sm_80": (Config(warps=8),), "sm_90": (Config(warps=8),)}
CLAIMS = {"sm_80": ("LDG.E.128", "STG.E.128"), "sm_90": ("LDG.E.128", "STG.E.128")}


def supports(
    x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int], eps: float, dtype: torch.dtype
) -> str | None:
    """Why the kernel cannot take these inputs, or None."""
    if pitch(x) is None or (experts != 1 and x.ndim != 2):
        return "its rows are not equally far apart" if experts == 1 else f"x has {x.ndim} dimensions"
    if x.shape[-1] > 16384:
        return "a row does not fit into registers"
    return "float64" if torch.float64 in (x.dtype, dtype) else None


def run(
    out: tuple[Tensor, ...], _workspace: None, x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int],
    eps: float, dtype: torch.dtype, config: Config | None = None,
) -> None:  # fmt: skip
    """A row a program; sums in float32."""
    C = x.shape[-1]
    L = x.numel() // C if C else 0
    second, third = first_rows(experts == 3, counts, L)
    launch(
        rms_norm_kernel,
        (L,),
        x,
        gain if gain is not None else x,
        out[0],
        pitch(x),
        second,
        third,
        C,
        eps,
        GAIN=gain is not None,
        EXPERTS=experts,
        BLOCK=triton.next_power_of_2(C),
        config=config or default(CONFIGS, x),
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The norms of the DiT: of a layer whose modalities have gains of their own, and of one that shares them."""
    for experts in (1, 3):
        x = torch.empty(4300, 5120, dtype=torch.bfloat16, device="meta")
        gain = torch.empty(experts * 5120, device="meta")
        yield f"{experts} experts", (x, gain, experts, [4000, 100, 200], 1e-6, torch.bfloat16)
