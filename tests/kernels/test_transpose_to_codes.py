"""Codes by a scale that is known, each channel's tokens side by side: saturating, NaN kept, zeros behind the last."""

import pytest
import torch
from exact_float8 import encode

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.ops import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 16, 37])
def test_every_code_in_its_place(dtype, rows):
    x = (100 * torch.randn(rows, 3, 20, generator=torch.Generator().manual_seed(rows))).to(dtype)
    x[-1:, 1, 2:5] = torch.tensor([torch.nan, torch.inf, -1e9], dtype=dtype)
    codes = ops.transpose_to_codes(x[:, :, 2:], torch.tensor([4.0]))
    assert (codes.dtype, list(codes.shape)) == (E4M3, [3, 18, (rows + 15) // 16 * 16])
    want = torch.from_numpy(encode(4.0 * x[:, :, 2:].double().numpy())).permute(1, 2, 0)
    assert torch.equal(codes[..., :rows].view(torch.uint8), want)
    assert not codes[..., rows:].view(torch.uint8).any()


def test_what_is_refused():
    for x in (torch.zeros(2, 3), torch.zeros(2, 3, 4).to(E4M3), torch.zeros(2, 3, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"x: got \[2, 3.*, allowed: \[L, H, D\], floats of 16 bits or more"):
            ops.transpose_to_codes(x, torch.ones(1))
    for inverse in (torch.ones(16), torch.tensor(1.0), torch.ones(1, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"inverse: got \[.*, allowed: \[1\] torch.float32"):
            ops.transpose_to_codes(torch.zeros(2, 3, 4), inverse)
