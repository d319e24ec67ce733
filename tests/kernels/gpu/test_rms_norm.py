"""The Triton kernel against float64 on hostile shapes and values: on a GPU, or else in Triton's interpreter."""

import pytest
import torch

from gpu import DEVICE, check
from horsepower.kernels.gpu import rms_norm
from horsepower.kernels.gpu.launch import Config
from horsepower.kernels.rms_norm import RMS_NORM

EPS = 1e-6
F32, BF16 = torch.float32, torch.bfloat16


def inputs(rows, dim, x_dtype=F32, dtype=BF16, experts=1, counts=(), scale=1.0):
    """All arguments of the op."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, dim, generator=generator) * scale
    gain = torch.randn(experts * dim, generator=generator) * 0.3 + 1
    return [x.to(DEVICE, x_dtype), gain.to(DEVICE), experts, list(counts), EPS, dtype]


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("dim", [1, 15, 16, 257])
def test_odd_and_prime_sizes(rows, dim):
    check(RMS_NORM, rms_norm, *inputs(rows, dim))


@pytest.mark.parametrize("x_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dtypes(x_dtype, dtype):
    check(RMS_NORM, rms_norm, *inputs(13, 250, x_dtype, dtype))


@pytest.mark.parametrize("counts", [(5, 3, 4), (12, 0, 0), (0, 0, 12), (0, 12, 0), (11, 0, 1)])
def test_a_gain_for_each_modality(counts):
    check(RMS_NORM, rms_norm, *inputs(12, 33, F32, F32, 3, counts))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15])
def test_tiny_and_huge(scale):
    check(RMS_NORM, rms_norm, *inputs(9, 100, F32, F32, scale=scale))


def test_strided_rows():
    x, *rest = inputs(9, 100)
    check(RMS_NORM, rms_norm, torch.cat([x, x], dim=1)[:, 100:], *rest)


def test_float16_and_a_gain_of_bfloat16():
    x, gain, *rest = inputs(7, 66, torch.float16)
    check(RMS_NORM, rms_norm, x, gain.to(BF16), *rest)


def test_a_batch_without_a_gain():
    x = inputs(15, 34)[0].view(3, 5, 34)
    check(RMS_NORM, rms_norm, x, None, 1, [], EPS, BF16)


def test_several_rows_a_program():
    config = Config(warps=4, constants={"TILE": 64})
    check(RMS_NORM, rms_norm, *inputs(11, 15), config=config)
    check(RMS_NORM, rms_norm, *inputs(11, 15, experts=3, counts=(5, 0, 6)), config=config)


def test_what_the_kernel_does_not_take():
    x, *rest = inputs(6, 40)
    assert rms_norm.supports(x.T.contiguous().T, *rest) == "the last dimension is not contiguous"
    assert rms_norm.supports(x.double(), *rest) == "float64"
    assert rms_norm.supports(x.view(2, 3, 40), rest[0], 3, *rest[2:]) == "x has 3 dimensions"
