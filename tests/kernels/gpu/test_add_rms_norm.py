"""The Triton kernel against float64 on hostile shapes and values: on a GPU, or else in Triton's interpreter."""

import pytest
import torch

from gpu import DEVICE, check
from horsepower.kernels.add_rms_norm import ADD_RMS_NORM
from horsepower.kernels.gpu import add_rms_norm
from horsepower.kernels.gpu.launch import Config

EPS = 1e-6
F32, BF16 = torch.float32, torch.bfloat16
SMALL = Config(warps=4, constants={"TILE": 64})  # of several rows and programs, short as the tests' tensors are


def inputs(rows, dim, branch_dtype=BF16, experts=1, post_experts=0, counts=(), dtype=BF16, scale=1.0):
    """All arguments of the op."""
    generator = torch.Generator().manual_seed(1)
    residual, branch = (torch.randn(rows, dim, generator=generator) * scale for _ in range(2))
    gain, post_gain = (torch.randn(n * dim, generator=generator) * 0.3 + 1 for n in (experts, post_experts))
    tensors = (residual, branch.to(branch_dtype), post_gain if post_experts else None, gain)
    return [*(None if x is None else x.to(DEVICE) for x in tensors), list(counts), EPS, dtype]


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("dim", [1, 15, 64, 257])
@pytest.mark.parametrize("post_experts", [0, 1])
def test_odd_and_prime_sizes(rows, dim, post_experts):
    check(ADD_RMS_NORM, add_rms_norm, *inputs(rows, dim, post_experts=post_experts), config=SMALL)


def test_the_widest_row():
    check(ADD_RMS_NORM, add_rms_norm, *inputs(2, 16384, post_experts=1))


@pytest.mark.parametrize("residual_dtype", [F32, BF16])
@pytest.mark.parametrize("branch_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dtypes(residual_dtype, branch_dtype, dtype):
    residual, *rest = inputs(13, 250, branch_dtype, dtype=dtype)
    got = check(ADD_RMS_NORM, add_rms_norm, residual.to(residual_dtype), *rest)
    if F32 in (residual_dtype, branch_dtype):  # the interpreter does not round a bfloat16 sum to nearest
        assert torch.equal(got[0], residual.to(residual_dtype) + rest[0])


@pytest.mark.parametrize("counts", [(5, 3, 4), (12, 0, 0), (0, 0, 12), (0, 12, 0), (11, 0, 1)])
@pytest.mark.parametrize(("experts", "post_experts"), [(3, 0), (1, 3), (3, 3)])
def test_a_gain_for_each_modality(counts, experts, post_experts):
    arguments = inputs(12, 33, F32, experts, post_experts, counts, F32)
    check(ADD_RMS_NORM, add_rms_norm, *arguments)
    check(ADD_RMS_NORM, add_rms_norm, *arguments, config=SMALL)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15])
def test_tiny_and_huge(scale):
    check(ADD_RMS_NORM, add_rms_norm, *inputs(9, 100, F32, post_experts=1, dtype=F32, scale=scale))


def test_strided_rows():
    residual, branch, _, gain, *rest = inputs(22, 130)
    check(ADD_RMS_NORM, add_rms_norm, residual[::2, :65], branch[1::2, 65:], None, gain[:65], *rest)


def test_not_finite_stays_in_its_row():
    residual, branch, *rest = inputs(6, 48, F32, post_experts=1)
    residual[1, 7], residual[3, 0], branch[4, 9] = torch.nan, torch.inf, torch.nan
    outputs = ADD_RMS_NORM.outputs(residual, branch, *rest)
    add_rms_norm.run(outputs, None, residual, branch, *rest, config=SMALL)
    for got, eager in zip(outputs, ADD_RMS_NORM.reference(residual, branch, *rest), strict=True):
        assert torch.equal(got.isnan(), eager.isnan())
        assert got[[0, 2, 5]].isfinite().all()


def test_what_the_kernel_does_not_take():
    residual, branch, _, gain, counts, eps, dtype = inputs(6, 40)
    turned = residual.T.contiguous().T
    assert (
        add_rms_norm.supports(turned, branch, None, gain, counts, eps, dtype) == "the last dimension is not contiguous"
    )
    assert add_rms_norm.supports(residual, branch, None, gain.double(), counts, eps, dtype) == "float64"
    assert add_rms_norm.supports(residual, branch, None, gain, counts, eps, torch.float64) == "float64"
    assert add_rms_norm.supports(*inputs(1, 16385)) == "a row does not fit into registers"
