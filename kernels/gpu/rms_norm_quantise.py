"""RMS norm that leaves in eight bits: a row stays in registers through both of its reductions."""

from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.gpu import quantise, rms_norm
from horsepower.kernels.gpu.launch import Config, default
from horsepower.kernels.gpu.rows import gain_of, places, refuses, store_codes


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
    return quantise.supports(x) or refuses(gain)


def run(
    out: tuple[Tensor, Tensor], _workspace: None, x: Tensor, gain: Tensor | None, experts: int, counts: Sequence[int],
    eps: float, config: Config | None = None,
) -> None:  # fmt: skip
    """A tile of whole rows a program, in float32."""
    rms_norm.start(rms_norm_quantise_kernel, out, x, gain, experts, counts, eps, config or default(CONFIGS, x))


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Those of the norm that leaves in 16 bits."""
    for label, inputs in rms_norm.examples():
        yield label, inputs[:-1]
