"""The compiled module, opened after torch so that both share one OpenMP runtime."""

from itertools import pairwise

import torch
from torch import Tensor

from horsepower import _native

ISAS = tuple(_native.isas())
ELEMENTS_A_THREAD = 32768
FLOATS = (torch.float32, torch.bfloat16)  # what the C++ reads and writes


def refuses(*tensors: Tensor) -> str | None:
    """Why no C++ kernel can walk the rows of these tensors, or None."""
    for x in tensors:
        if not x.is_cpu:
            return "not on the CPU"
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            return "the last dimension is not contiguous"
    return None


def pitch(x: Tensor) -> int | None:
    """Elements between the rows of x [..., C], all of which are equally far apart; None if they are not."""
    if x.ndim == 2:
        return x.stride(0)
    if x.is_contiguous():  # what is asked first is what is true most often: this runs at every call
        return x.shape[-1]
    steps = [(n, step) for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    if x.numel() and any(outer[1] != inner[0] * inner[1] for outer, inner in pairwise(steps)):
        return None
    return steps[-1][1] if steps else x.shape[-1]


def threads(work: int) -> int:
    """How many for so many elements: to wake another takes 30 to 110 us, as long as tens of thousands of elements."""
    return max(1, min(torch.get_num_threads(), work // ELEMENTS_A_THREAD))
