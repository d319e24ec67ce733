"""The compiled module, opened after torch so that both share one OpenMP runtime."""

from itertools import pairwise

import torch
from torch import Tensor

from horsepower import _native

ISAS = tuple(_native.isas())
ELEMENTS_A_THREAD = 8192


def refuses(*tensors: Tensor) -> str | None:
    """Why no C++ kernel can walk the rows of these tensors, or None."""
    if any(x.device.type != "cpu" for x in tensors):
        return "not on the CPU"
    if any(x.stride(-1) != 1 and x.shape[-1] != 1 for x in tensors):
        return "the last dimension is not contiguous"
    return None


def pitch(x: Tensor) -> int | None:
    """Elements between the rows of x [..., C], all of which are equally far apart; None if they are not."""
    steps = [(n, step) for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    if x.numel() and any(outer[1] != inner[0] * inner[1] for outer, inner in pairwise(steps)):
        return None
    return steps[-1][1] if steps else x.shape[-1]


def threads(work: int) -> int:
    """How many for so many elements: to wake another takes 30 to 110 us, as long as thousands of elements."""
    return max(1, min(torch.get_num_threads(), work // ELEMENTS_A_THREAD))
