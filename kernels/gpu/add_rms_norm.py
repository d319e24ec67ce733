"""Residual addition, RMS norm and cast: rows stay in registers from the addition through one reduction, or two."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.gpu.launch import Config, default, launch, writes_no_codes
from horsepower.kernels.gpu.rows import WIDEST, gain_of, places, refuses, step, tile
from horsepower.kernels.modality import first_rows
from horsepower.kernels.target import GPUS


@triton.jit
def added_and_normed(
    residual, branch, post_gain, gain, total, residual_steps, branch_steps, row, column, second, third, L, eps,
    POST_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write the sum of the rows; returns it normed, in float32."""
    inside = (row < L) & (column < C)
    b = tl.load(branch + row * branch_steps * STEP + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(residual + row * residual_steps * STEP + column, mask=inside, other=0.0).to(tl.float32)
    if POST_EXPERTS > 0:
        b *= tl.rsqrt(tl.sum(b * b, axis=1, keep_dims=True) / C + eps)
        b *= gain_of(post_gain, row, column, inside, second, third, C, POST_EXPERTS)
    v = (r + b).to(total.dtype.element_ty)
    tl.store(total + row * C + column, v, mask=inside)
    v = v.to(tl.float32)
    v *= tl.rsqrt(tl.sum(v * v, axis=1, keep_dims=True) / C + eps)
    return v * gain_of(gain, row, column, inside, second, third, C, EXPERTS)


@triton.jit(do_not_specialize=["residual_steps", "branch_steps", "second", "third", "L"])
def add_rms_norm_kernel(
    residual, branch, post_gain, gain, total, normed, residual_steps, branch_steps, second, third, L, eps,
    POST_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, column = places(ROWS, BLOCK, VECTOR)
    v = added_and_normed(
        residual, branch, post_gain, gain, total, residual_steps, branch_steps, row, column, second, third, L, eps,
        POST_EXPERTS, EXPERTS, STEP, C,
    )  # fmt: skip
    tl.store(normed + row * C + column, v.to(normed.dtype.element_ty), mask=(row < L) & (column < C))


# predicted. Eight warps cut 5120 columns into five accesses a thread that leave no lane idle, in 40 registers (64
# with a post-norm): six rows a multiprocessor. Four warps spill at 16384 columns, sixteen idle at 5120.
CONFIGS = {arch: (Config(warps=8, constants={"TILE": 4096}),) for arch in GPUS}
CLAIMS = {arch: {"add_rms_norm_kernel": ("LDG.E.128", "STG.E.128")} for arch in GPUS}


def supports(
    residual: Tensor, branch: Tensor, post_gain: Tensor | None, gain: Tensor, counts: Sequence[int], eps: float,
    dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take these inputs, or None."""
    if residual.shape[1] > WIDEST:
        return "a row does not fit into registers"
    if dtype == torch.float64:
        return "float64"
    return writes_no_codes(residual, dtype) or refuses(residual, branch, post_gain, gain)


def run(
    out: tuple[Tensor, Tensor], _workspace: None, residual: Tensor, branch: Tensor, post_gain: Tensor | None,
    gain: Tensor, counts: Sequence[int], eps: float, dtype: torch.dtype, config: Config | None = None,
) -> None:  # fmt: skip
    """A tile of whole rows a program; sums in float32."""
    config = config or default(CONFIGS, residual)
    start(add_rms_norm_kernel, out, residual, branch, post_gain, gain, counts, eps, config)


def start(
    kernel: Any, out: tuple[Tensor, ...], residual: Tensor, branch: Tensor, post_gain: Tensor | None, gain: Tensor,
    counts: Sequence[int], eps: float, config: Config,
) -> None:  # fmt: skip
    """Launch `kernel(residual, branch, post_gain, gain, *out, ...)`, `out` the sum and what is made of it."""
    L, C = residual.shape
    if not residual.numel():
        return
    post_experts, experts = (0 if own is None else own.shape[0] // C for own in (post_gain, gain))
    cut, unit = tile(C, config, residual, branch, *out[:2]), step(residual, branch)
    launch(
        kernel,
        (triton.cdiv(L, cut["ROWS"]),),
        residual,
        branch,
        gain if post_gain is None else post_gain,
        gain,
        *out,
        residual.stride(0) // unit,
        branch.stride(0) // unit,
        *first_rows(3 in (post_experts, experts), counts, L),
        L,
        eps,
        POST_EXPERTS=post_experts,
        EXPERTS=experts,
        STEP=unit,
        **cut,
        config=config,
    )


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The seams of the DiT: gains shared or of each modality; a post-norm.

    The widest rows; rows 8 bytes aligned; narrow rows, several of them a program.
    """
    shapes = ((5120, 0, 1), (5120, 0, 3), (5120, 3, 3), (16384, 3, 3), (13652, 1, 1), (1024, 1, 3))
    for C, post_experts, experts in shapes:
        residual = torch.empty(4300, C, device="meta")
        branch = torch.empty(4300, C, dtype=torch.bfloat16, device="meta")
        post_gain = torch.empty(post_experts * C, device="meta") if post_experts else None
        gain = torch.empty(experts * C, device="meta")
        label = f"{C} columns, {experts} experts, {post_experts} of a post-norm"
        yield label, (residual, branch, post_gain, gain, [4000, 100, 200], 1e-6, torch.bfloat16)
