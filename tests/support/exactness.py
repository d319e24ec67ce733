"""How far a kernel may be from the exact answer."""

import torch
from torch import Tensor

from horsepower.kernels.float8 import codes_of

ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}


def check_exactness(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Not further from float64 than eager, but for a rounding of the output; in relative L2."""
    assert got.shape == exact.shape
    if exact.numel() and exact.norm():
        error, eager_error = (float((x.double() - exact).norm() / exact.norm()) for x in (got, eager))
        assert error <= max(1.1 * eager_error, 4 * ULP[got.dtype])


def check_codes(got: Tensor, exact: Tensor, error: float = 1e-5) -> None:
    """The codes nearest to float64 `exact`; what lies beside a tie, within an error of float32, may fall either way."""
    slack = error * (exact.abs() + 1)
    low, nearest, high = (codes_of(x, 1.0).double() for x in (exact - slack, exact, exact + slack))
    code = got.double()
    assert got.shape == exact.shape
    assert torch.equal(code.isnan(), exact.isnan())
    assert (((low <= code) & (code <= high)) | code.isnan()).all()
    assert ((code != nearest) & ~code.isnan()).sum() <= 0.01 * code.numel()
