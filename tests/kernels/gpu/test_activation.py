"""The Triton kernel against float64 on hostile shapes and values: on a GPU, or else in Triton's interpreter."""

import pytest
import torch

from exactness import check_codes
from gpu import DEVICE, check
from horsepower.kernels.activation import ACTIVATION, FP8_GAINS, KINDS
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu import activation
from horsepower.kernels.gpu.launch import Config

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
SMALL = Config(warps=4, constants={"TILE": 64})  # so that a row takes several programs


def values(rows, columns, dtype=BF16, scale=4.0):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * scale).to(DEVICE, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (3, 0), (1, 2), (7, 14), (3, 2 * 257)])
def test_odd_and_prime_sizes(kind, rows, columns):
    check(ACTIVATION, activation, values(rows, columns), kind, BF16, config=SMALL)
    if kind == "gelu7":
        check(ACTIVATION, activation, values(rows, columns + 1), kind, BF16, config=SMALL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("u_dtype", [F16, F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dtypes(kind, u_dtype, dtype):
    check(ACTIVATION, activation, values(13, 250, u_dtype), kind, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_float16_is_the_float32_result_rounded(kind):
    u = values(3, 70, F16)
    got = [ACTIVATION.outputs(u, kind, dtype) for dtype in (F16, F32)]
    for out in got:
        activation.run(out, None, u, kind, out[0].dtype)
    assert torch.equal(got[0][0], got[1][0].half())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-37, 1e-3, 30, 1e37])
def test_tiny_and_huge(kind, scale):
    check(ACTIVATION, activation, values(9, 100, F32, scale), kind, F32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0, 1, 4, 8])
@pytest.mark.parametrize("config", [None, SMALL])
def test_strided_rows(kind, first, config):
    """From columns that are aligned, half aligned and not at all on."""
    check(ACTIVATION, activation, values(6, 144)[::2, first : first + 68], kind, BF16, config=config)


def test_a_batch_of_rows():
    u = values(12, 64).unflatten(0, (3, 4))
    check(ACTIVATION, activation, u, "swiglu7", BF16, config=SMALL)
    check(ACTIVATION, activation, u[:, :, 2:40], "swiglu7", BF16, config=SMALL)


@pytest.mark.parametrize("kind", KINDS)
def test_every_bfloat16_is_as_in_eager(kind):
    """NaN, infinities, zeros and denormals included; a NaN on either side of a pair."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)
    for u in (torch.stack((every, every.flip(0)), dim=1), torch.stack((every.flip(0), every), dim=1)):
        u = u.view(1, -1).to(DEVICE)
        out = ACTIVATION.outputs(u, kind, F32)
        activation.run(out, None, u, kind, F32)
        eager = ACTIVATION.reference(u, kind, F32)[0]
        if kind in ("gelu", "gelu_tanh"):  # eager loses all digits of the left tail, and overflows
            kept = (u > -3) & (u < 1e38)
            torch.testing.assert_close(out[0][kept], eager[kept], rtol=1e-3, atol=2e-37)
            assert out[0][u.isnan()].isnan().all()
        else:
            torch.testing.assert_close(out[0], eager, rtol=5e-5, atol=2e-37, equal_nan=True)


def test_what_the_kernel_does_not_take():
    assert activation.supports(torch.ones(8, 4).T, "silu", F32) == "the last dimension is not contiguous"
    assert activation.supports(torch.ones(2, 3, 8)[:, :2], "silu", F32) == "its rows are not equally far apart"
    assert activation.supports(torch.ones(2, 8), "silu", torch.float64) == "float64"


@pytest.mark.parametrize("kind", FP8_GAINS)
@pytest.mark.parametrize("u_dtype", [F16, F32, BF16])
def test_results_leave_as_codes(kind, u_dtype):
    """As far out as the limits, which become the largest codes; what is not a number stays so."""
    u = values(13, 250, u_dtype, 4)
    u[0, :2], u[1, 0], u[2, 1] = 1e4, torch.nan, torch.nan
    for strided in (u, u[:, 2:244]):
        outputs = ACTIVATION.outputs(strided, kind, E4M3)
        outputs[0].view(torch.uint8).fill_(0)
        activation.run(outputs, None, strided, kind, E4M3, config=SMALL)
        (exact,) = ACTIVATION.reference(strided.double(), kind, torch.float64)
        check_codes(outputs[0], exact * FP8_GAINS[kind])
    outputs = ACTIVATION.outputs(u, kind, E4M3)
    activation.run(outputs, None, u, kind, E4M3)
    assert outputs[0][0, 0].float() == 448
