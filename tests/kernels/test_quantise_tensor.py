"""One scale for each expert's part: the quantiser of rows, over one long row."""

import pytest
import torch

from horsepower.kernels.ops import ops


def test_each_experts_largest_value_is_448():
    x = torch.randn(12, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)[:, None]
    codes, scales = ops.quantise_tensor(x.bfloat16(), 3)
    assert scales.shape == (3, 1)
    for part, own, scale in zip(x.bfloat16().chunk(3), codes.float().chunk(3), scales, strict=True):
        assert own.abs().max() == 448
        assert torch.equal(own, ops.quantise(part.reshape(1, -1))[0].float().view(part.shape))
        assert scale == part.abs().max().float() / 448
    for none in (5, 0, -3):
        with pytest.raises(ValueError, match=rf"x: got \[12, 7\], allowed: \[{none} R, C\]"):
            ops.quantise_tensor(x, none)
