"""Zeros below and beside each expert's part of a weight, and what is refused."""

import pytest
import torch

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.ops import ops


def test_zeros_below_and_beside_each_expert():
    weight = torch.arange(1.0, 13).view(6, 2)
    padded = ops.pad_weight(weight, 3, 1, 2)
    assert padded.shape == (9, 4)
    for i in range(3):
        assert torch.equal(padded[3 * i : 3 * i + 2, :2], weight[2 * i : 2 * i + 2])
    assert padded.count_nonzero() == 12
    for experts in (4, 0):
        with pytest.raises(ValueError, match=rf"weight: got \[6, 2\], allowed: \[{experts} O, I\]"):
            ops.pad_weight(weight, experts, 1, 2)


def test_codes_are_padded_with_zeros():
    codes = torch.full((6, 2), -1.0).to(E4M3)
    padded = ops.pad_weight(codes, 3, 1, 2)
    assert padded.dtype == E4M3
    assert torch.equal(padded.float(), ops.pad_weight(codes.float(), 3, 1, 2))
