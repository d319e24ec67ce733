"""The eight-bit format of weights and activations: e4m3 codes (float8_e4m3fn), and float32 scales that undo them.

A value is its code times a scale. Codes are rounded twice, to float32 and then to e4m3, each time to the nearest, ties
to even; what is too large saturates at 448, what is not a number stays none.
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
LEAST = 2.0**-100  # of a row's largest value: its scale and the inverse of that stay normal numbers


def codes_of(x: Tensor, inverse: Tensor | float) -> Tensor:
    """x, float32 or float64, times `inverse`, in e4m3."""
    return (x * inverse).clamp(-LARGEST, LARGEST).to(E4M3)


def scale_up_to(bound: Tensor) -> Tensor:
    """The power of two, float32, that as a scale brings values up to a bound into codes; scaling by it is exact."""
    return (bound / LARGEST).clamp(LEAST, 2.0**120).log2().ceil().exp2().float()


def widen(x: Tensor) -> Tensor:
    """In float32; float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def arithmetic(x: torch.dtype) -> torch.dtype:
    """What a product of x is rounded to: x's own dtype, or bfloat16 for codes."""
    return torch.bfloat16 if x == E4M3 else x


def bits(x: Tensor) -> Tensor:
    """Codes as bytes, for what moves values and computes nothing; any other dtype as it is."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x
