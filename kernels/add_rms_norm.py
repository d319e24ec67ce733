"""Residual addition, RMS norm and cast in one pass: how a branch ends and the next one begins.

    sum = residual + branch                        or, with a post-norm,  residual + norm(branch) * post_gain
    normed = cast(norm(sum) * gain)                where norm(x) = x * rsqrt(mean(x^2) + eps), at least in float32

Rows are tokens. Each gain is one row, or one row a modality; `counts` then says how many tokens each modality has.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from horsepower import _native
from horsepower.kernels.modality import check_counts, first_rows
from horsepower.kernels.native_library import ISAS, refuses, threads
from horsepower.kernels.registry import Cost, Kernel, Op, register
from horsepower.kernels.rms_norm import reference as rms_norm
from horsepower.kernels.sizes import differ
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = (
    "(Tensor residual, Tensor branch, Tensor? post_gain, Tensor gain, SymInt[] counts, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor)"
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def outputs(
    residual: Tensor, branch: Tensor, post_gain: Tensor | None, gain: Tensor, counts: Sequence[int], eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """residual, branch [L, C], gains [C] or [3 C] -> sum [L, C] in the wider dtype of the two, normed in `dtype`.

    Raises ValueError for inputs that do not belong together.
    """
    if residual.ndim != 2 or residual.dtype not in FLOATS:
        raise ValueError(f"residual: got {list(residual.shape)} {residual.dtype}, allowed: [L, C] of {FLOATS}")
    L, C = residual.shape
    if differ(branch.shape, (L, C)) or branch.dtype not in FLOATS:
        raise ValueError(f"branch: got {list(branch.shape)} {branch.dtype}, allowed: {[L, C]} of {FLOATS}")
    for name, own in (("post_gain", post_gain), ("gain", gain)):
        if own is None:
            continue
        if (differ(own.shape, (C,)) and differ(own.shape, (3 * C,))) or own.dtype not in FLOATS:
            raise ValueError(f"{name}: got {list(own.shape)} {own.dtype}, allowed: [C] or [3 C] with C = {C}")
        if _experts(own, C) == 3:
            check_counts(counts, L)
    if dtype not in FLOATS:
        raise ValueError(f"dtype: got {dtype}, allowed: {FLOATS}")
    total = residual.new_empty((L, C), dtype=torch.promote_types(residual.dtype, branch.dtype))
    return total, residual.new_empty((L, C), dtype=dtype)


def _experts(gain: Tensor, dim: int) -> int:
    return 1 if gain.shape[0] == dim else 3


def reference(
    residual: Tensor, branch: Tensor, post_gain: Tensor | None, gain: Tensor, counts: Sequence[int], eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in plain PyTorch; float64 inputs give the exact answer."""
    C = residual.shape[1]
    sum_dtype = torch.promote_types(residual.dtype, branch.dtype)
    wide = torch.promote_types(sum_dtype, torch.float32)
    if post_gain is not None:
        branch = rms_norm(branch.to(wide), post_gain, _experts(post_gain, C), counts, eps, wide)[0]
    total = (residual + branch).to(sum_dtype)
    return total, rms_norm(total, gain, _experts(gain, C), counts, eps, dtype)[0]


def native_supports(
    residual: Tensor, branch: Tensor, post_gain: Tensor | None, gain: Tensor, counts: Sequence[int], eps: float,
    dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """Why the C++ kernel cannot take these inputs, or None."""
    gains = (gain,) if post_gain is None else (post_gain, gain)
    if any(x.dtype != torch.float32 for x in (residual, *gains)):
        return "residual and gains are not float32"
    if torch.float64 in (branch.dtype, dtype):
        return "float64"
    if torch.float16 in (branch.dtype, dtype):
        return "float16"
    return refuses(residual, branch, *gains)


def native(
    out: tuple[Tensor, Tensor], _workspace: None, residual: Tensor, branch: Tensor, post_gain: Tensor | None,
    gain: Tensor, counts: Sequence[int], eps: float, dtype: torch.dtype, isa: str = ISAS[0],
) -> None:  # fmt: skip
    """C++ in the widest instruction set of this CPU; rows may be strided, one row runs on one thread."""
    total, normed = out
    L, C = residual.shape
    post_pitch, pitch = (0 if own is None or _experts(own, C) == 1 else C for own in (post_gain, gain))
    second, third = first_rows(max(post_pitch, pitch) > 0, counts, L)
    _native.add_rms_norm(
        isa,
        residual.data_ptr(),
        branch.data_ptr(),
        0 if post_gain is None else post_gain.data_ptr(),
        gain.data_ptr(),
        total.data_ptr(),
        normed.data_ptr(),
        residual.stride(0),
        branch.stride(0),
        post_pitch,
        pitch,
        L,
        C,
        second,
        third,
        eps,
        branch.dtype == torch.bfloat16,
        dtype == torch.bfloat16,
        threads(residual.numel()),
    )


def cost(
    residual: Tensor, branch: Tensor, post_gain: Tensor | None, gain: Tensor, counts: Sequence[int], eps: float,
    dtype: torch.dtype,
) -> Cost:  # fmt: skip
    """Per value: an addition; a square and its sum and two products for each norm; each tensor passes memory once."""
    n = residual.numel()
    sum_dtype = torch.promote_types(residual.dtype, branch.dtype)
    moved = n * (residual.itemsize + branch.itemsize + sum_dtype.itemsize + dtype.itemsize)
    gains = (gain,) if post_gain is None else (post_gain, gain)
    return Cost(flops=(1 + 4 * len(gains)) * n, bytes=moved + sum(own.numel() * own.itemsize for own in gains))


ADD_RMS_NORM = register(
    Op(
        "add_rms_norm",
        SCHEMA,
        outputs,
        reference,
        cost,
        kernels=(Kernel("native", native_supports, native), triton_kernel("add_rms_norm")),
    )
)
