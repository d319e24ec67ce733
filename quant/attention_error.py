"""The error of attention in eight bits, without its gate, on some of its rows; relative L2 against float64."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from horsepower.kernels.attention import ATTENTION
from horsepower.kernels.attention_ranges import key_ranges
from horsepower.kernels.float8 import codes_of, widen
from horsepower.kernels.transpose_to_codes import TRANSPOSE_TO_CODES
from horsepower.quant.budget import ProductError, relative

FULL: tuple[Any, ...] = (None, 1, [], 1, 0, -1)  # no gate; all keys
ROWS = 32  # at a time: float64 scores of so many and 66,000 keys are 0.7 GB


@dataclass(frozen=True)
class Heads:
    """Queries [L, Hq, D], keys and values [S, Hkv, D], as exact as they are known, and the scales of their codes."""

    q: Tensor
    k: Tensor
    v: Tensor
    scales: tuple[Tensor, Tensor, Tensor]  # float32 [1] each


def attention_error(
    heads: Heads, dtype: torch.dtype, at: Tensor, frames: int, video: int, window: int
) -> ProductError:  # fmt: skip
    """Of the rows `at`, ascending; dtype: the 16 bits of a plan without codes; the others as `attention` takes them."""
    narrow = [x.to(dtype) for x in (heads.q, heads.k, heads.v)]
    wide = [x.double() for x in (heads.q, heads.k, heads.v)]
    q, k, v = (widen(x) for x in (heads.q, heads.k, heads.v))
    q_scale, k_scale, v_scale = heads.scales
    q, k = codes_of(q, q_scale.reciprocal()), codes_of(k, k_scale.reciprocal())
    scales, inverse = torch.cat([q_scale * k_scale, v_scale]), v_scale.reciprocal()
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    for queries, parts in key_ranges(frames, video, window, len(q), len(k)):
        seen = torch.cat([torch.arange(part.start, part.stop, device=at.device) for part in parts])
        turned = TRANSPOSE_TO_CODES(v[seen], inverse)[0]
        for rows in at[(at >= queries.start) & (at < queries.stop)].split(ROWS):
            if len(rows):
                exact, own = (ATTENTION.reference(x[rows], y[seen], z[seen], *FULL)[0] for x, y, z in (wide, narrow))
                made.append((exact, own, ATTENTION.reference(q[rows], k[seen], turned, *FULL, None, scales)[0]))
    exact, own, codes = (torch.cat(each) for each in zip(*made, strict=True))
    length = exact.square().sum()
    return ProductError(*relative([(x.double() - exact).square().sum() for x in (own, codes)], length))
