"""How far a kernel may be from the exact answer."""

import torch
from torch import Tensor

ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}


def check_exactness(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Not further from float64 than eager, but for a rounding of the output; in relative L2."""
    assert got.shape == exact.shape
    if exact.numel() and exact.norm():
        error, eager_error = (float((x.double() - exact).norm() / exact.norm()) for x in (got, eager))
        assert error <= max(1.1 * eager_error, 4 * ULP[got.dtype])
