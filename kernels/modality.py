"""Rows by modality: video, audio and text are contiguous ranges of one sequence, and may have weights of their own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check_counts(counts: Sequence[int], rows: int) -> None:
    """Raises ValueError unless `counts` are three that sum to `rows`; symbolic counts are trusted."""
    concrete = all(type(n) is int for n in (*counts, rows))
    if len(counts) != 3 or (concrete and (sum(counts) != rows or min(counts) < 0)):
        raise ValueError(f"counts: got {list(counts)}, allowed: three that sum to {rows}")


def check_experts(experts: int, counts: Sequence[int], rows: int) -> None:
    """Raises ValueError unless there is one expert, or three with `counts` that fit."""
    if experts not in (1, 3):
        raise ValueError(f"experts: got {experts}, allowed: 1, 3")
    if experts == 3:
        check_counts(counts, rows)


def first_rows(per_modality: bool, counts: Sequence[int], rows: int) -> tuple[int, int]:
    """Where the second and the third modality's rows begin; `rows` both if no gain is per modality."""
    return (counts[0], counts[0] + counts[1]) if per_modality else (rows, rows)


def by_modality(compute: Callable[..., Tensor], experts: int, counts: Sequence[int], x: Tensor, *own: Tensor) -> Tensor:
    """`compute(rows, *own parts)` for each expert's rows of x; each tensor of `own` stacks the experts' parts."""
    if experts == 1:
        return compute(x, *own)
    parts = zip(x.split(list(counts)), *(tensor.chunk(experts) for tensor in own), strict=True)
    return torch.cat([compute(*part) for part in parts])
