"""e4m3 once more, from its definition: a table of all values in float64, and the nearest of them."""

import numpy as np
import torch
from torch import Tensor

BYTES = np.arange(128)
EXPONENT, MANTISSA = BYTES >> 3, BYTES & 7
# 1.mmm x 2^(eeee - 7), or 0.mmm x 2^-6 below; 1111.111 is not a number
VALUES = np.where(EXPONENT > 0, (1 + MANTISSA / 8) * 2.0 ** (EXPONENT - 7), MANTISSA / 8 * 2.0**-6)[:127]


def encode(x: np.ndarray) -> np.ndarray:
    """Bytes of the nearest values to float64 x; ties to the even mantissa, saturating, NaN kept."""
    size = np.minimum(np.abs(x), 448.0)
    above = np.searchsorted(VALUES, np.nan_to_num(size)).clip(max=126)
    below = (above - 1).clip(min=0)
    up, down = VALUES[above] - size, size - VALUES[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    code = np.where(np.isnan(x), 127, code)
    return (code | (np.signbit(x).astype(int) << 7)).astype(np.uint8)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as bytes, and scales, of rows: each step in float64, then rounded to float32 where the format says so."""
    wide = x.double().numpy()
    with np.errstate(invalid="ignore"):
        largest = np.maximum(np.abs(wide).max(1, keepdims=True, initial=0), 2.0**-100)
        scale, inverse = (np.float32(q).astype(np.float64) for q in (largest / 448, 448 / largest))
        product = np.float32(wide * inverse).astype(np.float64)
    return torch.from_numpy(encode(product)), torch.from_numpy(scale.astype(np.float32))
