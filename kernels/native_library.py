"""The compiled module, opened after torch so that both share one OpenMP runtime."""

import torch

from horsepower import _native

ISAS = tuple(_native.isas())


def threads() -> int:
    """As many as torch uses."""
    return torch.get_num_threads()
