"""Residual addition and RMS norm that leaves in eight bits: rows stay in registers through two reductions, or three."""

from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu import add_rms_norm
from horsepower.kernels.gpu.add_rms_norm import added_and_normed
from horsepower.kernels.gpu.launch import Config, default
from horsepower.kernels.gpu.rows import places, store_codes


@triton.jit(do_not_specialize=["residual_steps", "branch_steps", "second", "third", "L"])
def add_rms_norm_quantise_kernel(
    residual, branch, post_gain, gain, total, codes, scales, residual_steps, branch_steps, second, third, L, eps,
    POST_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, column = places(ROWS, BLOCK, VECTOR)
    v = added_and_normed(
        residual, branch, post_gain, gain, total, residual_steps, branch_steps, row, column, second, third, L, eps,
        POST_EXPERTS, EXPERTS, STEP, C,
    )  # fmt: skip
    store_codes(codes, scales, row, column, L, C, v)


CONFIGS = {"sm_90": (Config(warps=8, constants={"TILE": 4096}),), "sm_80": ()}  # predicted, as of add_rms_norm
CLAIMS = {"sm_90": {"add_rms_norm_quantise_kernel": ("LDG.E.128", "STG.E.128", "F2FP.SATFINITE.E4M3", "REDUX")}}


def supports(
    residual: Tensor, branch: Tensor, post_gain: Tensor | None, gain: Tensor, counts: Sequence[int], eps: float
) -> str | None:
    """Why the kernel cannot take these inputs, or None."""
    if not residual.shape[1]:
        return "there are no columns"
    return add_rms_norm.supports(residual, branch, post_gain, gain, counts, eps, E4M3)


def run(
    out: tuple[Tensor, Tensor, Tensor], _workspace: None, residual: Tensor, branch: Tensor, post_gain: Tensor | None,
    gain: Tensor, counts: Sequence[int], eps: float, config: Config | None = None,
) -> None:  # fmt: skip
    """A tile of whole rows a program; sums in float32."""
    config = config or default(CONFIGS, residual)
    add_rms_norm.start(add_rms_norm_quantise_kernel, out, residual, branch, post_gain, gain, counts, eps, config)


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Those of the norm that leaves in 16 bits."""
    for label, inputs in add_rms_norm.examples():
        yield label, inputs[:-1]
