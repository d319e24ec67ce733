"""Codes by a scale that is known: saturating, NaN kept."""

import pytest
import torch

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.ops import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_times_a_number(dtype):
    x = torch.tensor([[0.0, 1.0, -1.0, 3.3], [1e3, -1e9, torch.inf, torch.nan]], dtype=dtype)
    codes = ops.to_codes(x, 2.0)
    assert codes.dtype == E4M3
    assert codes.float().nan_to_num(7).tolist() == [[0, 2, -2, 6.5], [448, -448, 448, 7]]


def test_what_is_refused():
    for x in (torch.zeros(2, dtype=torch.int64), torch.zeros(2).to(E4M3), torch.zeros(2).to(torch.float8_e5m2)):
        with pytest.raises(ValueError, match="x: got .*, allowed: floats"):
            ops.to_codes(x, 1.0)
