"""Inputs that find what ordinary ones do not: of all sizes, with rows that are alike or empty."""

import torch
from torch import Tensor

HOSTILE = ("random", "huge", "largest", "tiny", "denormal", "constant rows", "zero rows")


def _scale(kind: str, dtype: torch.dtype, scores: bool) -> float:
    """Of normal values. The largest have squares that overflow; where they make `scores`, sums of 64 products do not.

    A score that overflows has no right answer: eager yields NaN, but 0 in the rows where all are -inf.
    """
    limits = torch.finfo(dtype)
    largest = float(limits.max**0.5) / (32 if scores else 1)
    scales: dict[str, float] = {"huge": 1e4, "largest": largest, "tiny": limits.tiny**0.5, "denormal": limits.tiny / 16}
    return scales.get(kind, 1.0)


def hostile(value: Tensor, kind: str, generator: torch.Generator, scores: bool) -> Tensor:
    """Normal values, scaled or with rows replaced, in the strides of `value`; NaN lies between its rows."""
    made = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    if kind == "constant rows" and made.ndim:
        made = made[..., :1].expand(value.shape)
    elif kind == "zero rows" and made.ndim and made.shape[0]:
        made[::3] = 0
        made[-1] = 0
    made = (made * _scale(kind, value.dtype, scores)).to(value.device, value.dtype)
    if value.numel() == 0 or 0 in value.stride():
        return made
    reach = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True)) + 1
    room = torch.full((reach,), torch.nan, dtype=value.dtype, device=value.device)
    return room.as_strided(value.shape, value.stride()).copy_(made)
