"""Which keys a query row of attention sees, and what its gate multiplies it by."""

from collections.abc import Sequence

import torch
from torch import Tensor


def key_ranges(frames: int, video: int, window: int, rows: int, keys: int) -> list[tuple[slice, tuple[slice, ...]]]:
    """Query rows, and the ranges of keys that they see; the ranges of queries are disjoint and cover all rows."""
    everything = (slice(0, keys),)
    if window < 0:
        return [(slice(0, rows), everything)]
    tokens = video // frames
    seen: dict[tuple[int, int], list[int]] = {}
    for frame in range(frames):
        seen.setdefault((max(0, frame - window), min(frames, frame + window + 1)), []).append(frame)
    ranges = [
        (
            slice(members[0] * tokens, (members[-1] + 1) * tokens),
            (slice(first * tokens, last * tokens), slice(video, rows)),
        )
        for (first, last), members in seen.items()
    ]
    return [*ranges, (slice(video, rows), everything)]


def gate_factor(gate: Tensor, experts: int, counts: Sequence[int], rows: int) -> Tensor:
    """sigmoid(gate) for each row and head, [rows, Hq, 1], in at least float32."""
    factor = torch.sigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))
    if gate.ndim == 1 and experts != 1:
        each = zip(factor.chunk(experts), counts, strict=True)
        factor = torch.cat([row.expand(count, -1) for row, count in each])
    return factor.expand(rows, -1)[..., None]
