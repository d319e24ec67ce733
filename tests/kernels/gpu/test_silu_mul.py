"""The Triton kernel against float64 on hostile shapes and values: on a GPU, or else in Triton's interpreter."""

import pytest
import torch

from gpu import DEVICE, check
from horsepower.kernels.gpu import silu_mul
from horsepower.kernels.gpu.launch import Config
from horsepower.kernels.silu_mul import SILU_MUL

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
SMALL = Config(warps=4, constants={"TILE": 64})


def pair(*shape, dtype=BF16, scale=4.0):
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(*shape, generator=generator) * scale, torch.randn(*shape, generator=generator)
    return gate.to(DEVICE, dtype), up.to(DEVICE, dtype)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (7, 14), (3, 257), (2, 5, 34), (4, 0)])
@pytest.mark.parametrize("x_dtype", [F16, F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_odd_sizes_and_dtypes(shape, x_dtype, dtype):
    check(SILU_MUL, silu_mul, *pair(*shape, dtype=x_dtype), dtype, config=SMALL)


@pytest.mark.parametrize("width", [70, 65, 64, 129])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_halves_of_one_projection(width, dtype):
    """The second half is aligned as its width is; rows of both are strided."""
    both = torch.cat(pair(2, 3, width, dtype=dtype), dim=-1)
    check(SILU_MUL, silu_mul, *both.chunk(2, dim=-1), BF16)
    check(SILU_MUL, silu_mul, *both.chunk(2, dim=-1), BF16, config=SMALL)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 30, 1e4, 1e18])
def test_tiny_and_huge(scale):
    check(SILU_MUL, silu_mul, *pair(9, 100, dtype=F32, scale=scale), F32)


def test_every_bfloat16_is_as_in_eager():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)[None].to(DEVICE)
    out = SILU_MUL.outputs(every, torch.ones_like(every), F32)
    silu_mul.run(out, None, every, torch.ones_like(every), F32)
    eager = SILU_MUL.reference(every, torch.ones_like(every), F32)[0]
    torch.testing.assert_close(out[0], eager, rtol=2e-5, atol=2e-37, equal_nan=True)


def test_what_the_kernel_does_not_take():
    x = torch.ones(8, 8)
    assert silu_mul.supports(x, x[::2, ::2].repeat(2, 2).T, F32) == "the last dimension is not contiguous"
    assert silu_mul.supports(x, x, torch.float64) == "float64"
