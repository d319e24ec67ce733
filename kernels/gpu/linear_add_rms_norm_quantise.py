"""A branch's last projection by tiles, which add the residual; a second kernel norms whole rows and quantises them."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu import linear_add_rms_norm, rms_norm_quantise
from horsepower.kernels.gpu.launch import Config, default
from horsepower.kernels.gpu.linear_add_rms_norm import add_branch
from horsepower.kernels.gpu.tiles import product_claims

CONFIGS = {"sm_90": linear_add_rms_norm.CONFIGS["sm_90"], "sm_80": ()}
CLAIMS = product_claims("linear_add_kernel", **rms_norm_quantise.CLAIMS["sm_90"])


def supports(
    x: Tensor, weight: Tensor, experts: int, residual: Tensor, post_gain: Tensor | None, gain: Tensor,
    counts: Sequence[int], eps: float, x_scale: Tensor | None = None, weight_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why the kernels cannot take these inputs, or None."""
    reason = linear_add_rms_norm.supports(
        x, weight, experts, residual, post_gain, gain, counts, eps, E4M3, x_scale, weight_scale
    )
    return reason or rms_norm_quantise.supports(residual, gain, 1, counts, eps)


def run(
    out: tuple[Tensor, Tensor, Tensor], _workspace: None, x: Tensor, weight: Tensor, experts: int, residual: Tensor,
    post_gain: Tensor | None, gain: Tensor, counts: Sequence[int], eps: float, x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None, config: Config | None = None,
) -> None:  # fmt: skip
    """Sums, norm and scales in float32. Rows of x, weight, residual and the sum may be padded."""
    total, codes, scales = out
    if not residual.numel():
        return
    config = config or default(CONFIGS, x, weight)
    add_branch(total, None, x, weight, experts, residual, counts, x_scale, weight_scale, config)
    rms_norm_quantise.run((codes, scales), None, total, gain, gain.shape[0] // total.shape[1], counts, eps)


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Those of the norm that leaves in 16 bits."""
    for label, (*inputs, _, x_scale, weight_scale) in linear_add_rms_norm.examples():
        yield label, (*inputs, x_scale, weight_scale)
