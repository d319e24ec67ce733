"""The Triton kernel against float64 on hostile shapes and values: on a GPU, or else in Triton's interpreter."""

import pytest
import torch

from gpu import DEVICE, check
from horsepower.kernels.gpu import layer_norm
from horsepower.kernels.gpu.launch import Config
from horsepower.kernels.layer_norm import LAYER_NORM

EPS = 1e-5
F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
SMALL = Config(warps=4, constants={"TILE": 64})


def inputs(rows, dim, x_dtype=F32, dtype=BF16, own_dtype=F32, scale=1.0, shift=0.5):
    """All arguments of the op."""
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*n, generator=generator) for n in ((rows, dim), (dim,), (dim,)))
    return [
        *(t.to(DEVICE, d) for t, d in (((x + shift) * scale, x_dtype), (weight, own_dtype), (bias, own_dtype))),
        EPS,
        dtype,
    ]


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("dim", [1, 15, 64, 257])
def test_odd_and_prime_sizes(rows, dim):
    check(LAYER_NORM, layer_norm, *inputs(rows, dim), config=SMALL)
    check(LAYER_NORM, layer_norm, *inputs(rows, dim))


@pytest.mark.parametrize("x_dtype", [F16, F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("own_dtype", [F32, BF16])
def test_dtypes(x_dtype, dtype, own_dtype):
    check(LAYER_NORM, layer_norm, *inputs(13, 250, x_dtype, dtype, own_dtype))


def test_a_mean_that_is_far_from_zero():
    """A variance from the difference of two means of squares would lose all digits."""
    check(LAYER_NORM, layer_norm, *inputs(5, 100, F32, F32, shift=1000.0))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15])
def test_tiny_and_huge(scale):
    check(LAYER_NORM, layer_norm, *inputs(9, 100, F32, F32, scale=scale))


def test_neither_weight_nor_bias_and_strided_rows():
    x, weight, _, *rest = inputs(18, 200)
    strided = x[::2, 101:]
    check(LAYER_NORM, layer_norm, strided, None, None, *rest)
    check(LAYER_NORM, layer_norm, strided, weight[:99], None, *rest)
    check(LAYER_NORM, layer_norm, x.view(3, 6, 200), None, None, *rest)


def test_what_the_kernel_does_not_take():
    x, weight, bias, *rest = inputs(6, 40)
    reason = "the last dimension is not contiguous"
    assert layer_norm.supports(x.T.contiguous().T, weight, bias, *rest) == reason
    assert layer_norm.supports(x, weight.repeat(2)[::2], bias, *rest) == reason
    assert layer_norm.supports(x.view(2, 3, 40)[:, :2], weight, bias, *rest) == "its rows are not equally far apart"
    assert layer_norm.supports(x.double(), weight, bias, *rest) == "float64"
