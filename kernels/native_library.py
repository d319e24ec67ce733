"""The compiled module, opened after torch so that both share one OpenMP runtime."""

import torch
from torch import Tensor

from horsepower import _native

ISAS = tuple(_native.isas())


def refuses(*tensors: Tensor) -> str | None:
    """Why no C++ kernel can walk the rows of these tensors, or None."""
    if any(x.device.type != "cpu" for x in tensors):
        return "not on the CPU"
    if any(x.stride(-1) != 1 and x.shape[-1] != 1 for x in tensors):
        return "the last dimension is not contiguous"
    return None


def threads() -> int:
    """As many as torch uses."""
    return torch.get_num_threads()
