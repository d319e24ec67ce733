"""Rows that stand for all: the first and last of each modality, and some between."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sample(counts: Sequence[int], rows: int, generator: torch.Generator) -> tuple[Tensor, tuple[int, ...]]:
    """Indices, ascending, of at most `rows` of sum(counts), each modality's edges among them; how many of each.

    Raises ValueError for fewer rows than edges.
    """
    starts = [sum(counts[:i]) for i in range(len(counts))]
    edges = sorted({at for start, n in zip(starts, counts, strict=True) if n for at in (start, start + n - 1)})
    if rows < len(edges):
        raise ValueError(f"rows: got {rows}, allowed: at least {len(edges)}, the edges of modalities")
    order = torch.randperm(sum(counts), generator=generator).tolist()
    chosen = sorted(list(dict.fromkeys([*edges, *order]))[:rows])
    own = tuple(sum(start <= at < start + n for at in chosen) for start, n in zip(starts, counts, strict=True))
    return torch.tensor(chosen, dtype=torch.long), own
