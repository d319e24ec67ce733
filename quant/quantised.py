"""A weight in eight bits, as a plan takes it: made at load, or read from a checkpoint. The bits are the same."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.quantise import QUANTISE
from horsepower.kernels.quantise_tensor import QUANTISE_TENSOR


class Quantised(NamedTuple):
    """A weight [R, C]: codes [R, C] in e4m3, and float32 scales: [R, 1] of its rows, or [E, 1] of E parts of R / E.

    See `kernels/float8.py`.
    """

    codes: Tensor
    scales: Tensor

    @property
    def bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


# What a plan's weights come from: each parameter and buffer by its name.
Values: TypeAlias = Mapping[str, Tensor | Quantised]


def quantise(weight: Tensor, scales: int) -> Quantised:
    """A weight [R, C] with so many scales: one for each of its rows, or for each of some equal parts."""
    return Quantised(*(QUANTISE(weight) if scales == len(weight) else QUANTISE_TENSOR(weight, scales)))


def quantised(name: str, weight: Tensor, scales: int) -> Quantised:
    """What a plan's load makes of a weight, as `quantise`. Raises ValueError if it holds NaN or an infinity."""
    made = quantise(weight, scales)
    if not torch.isfinite(made.scales).all():  # a scale is not finite if one of its values is not
        raise ValueError(f"{name}: got NaN or infinite values, allowed: finite ones")
    return made


def check_pair(name: str, got: Quantised, shape: Sequence[int], scales: int) -> None:
    """Raises ValueError unless they are codes of a weight of this shape, and so many scales."""
    for what, x, dtype, wanted in (
        ("codes", got.codes, E4M3, list(shape)),
        ("scales", got.scales, torch.float32, [scales, 1]),
    ):
        if (list(x.shape), x.dtype) != (wanted, dtype):
            raise ValueError(f"{name}: got {what} {list(x.shape)} {x.dtype}, allowed: {wanted} {dtype}")


def plain(name: str, value: Tensor | Quantised) -> Tensor:
    """A weight that is needed as it is. Raises ValueError for codes, which nobody turns back."""
    if isinstance(value, Quantised):
        raise ValueError(f"{name}: got codes of eight bits, allowed: {name} as it was, which is not quantised here")
    return value
