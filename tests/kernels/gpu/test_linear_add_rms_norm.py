"""The Triton kernels against float64 on hostile shapes and values: on a GPU, or else in Triton's interpreter."""

import pytest
import torch
from tiles import BF16, F16, F32, codes, config, normal

from gpu import DEVICE, check, workspace
from horsepower.kernels.gpu import linear_add_rms_norm
from horsepower.kernels.linear_add_rms_norm import LINEAR_ADD_RMS_NORM

EPS = 1e-6
BOTH = [config(tma, columns=128, PARTS=parts) for tma, parts in ((1, 4), (0, 2))]
ALL = [*BOTH, config(1, columns=128, PARTS=2, MORE=64)]


def inputs(rows, depth, columns, experts=1, counts=(), gains=1, scale=1.0, residual_dtype=F32, dtype=F16):
    """All arguments of the op; every third row of the residual is scaled."""
    x, weight = normal(rows, depth), normal(experts * columns, depth, seed=2)
    residual = normal(rows, columns, dtype=residual_dtype, seed=3)
    residual[::3] *= scale
    gain = 1 + 0.3 * normal(gains * columns, dtype=F32, seed=4)
    return [x, weight, experts, residual, None, gain, list(counts), EPS, dtype]


@pytest.mark.parametrize("config", ALL, ids=str)
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(0, 16, 16), (1, 1, 4), (17, 31, 132), (37, 8, 300), (16, 16, 1028)]
)
def test_odd_and_prime_sizes(config, rows, depth, columns):
    check(LINEAR_ADD_RMS_NORM, linear_add_rms_norm, *inputs(rows, depth, columns), config=config)


@pytest.mark.parametrize("config", ALL, ids=str)
@pytest.mark.parametrize("experts", [1, 3])
def test_columns_that_end_with_a_quarter_of_a_tile(config, experts):
    arguments = inputs(20, 24, 160, experts, (9, 6, 5))
    check(LINEAR_ADD_RMS_NORM, linear_add_rms_norm, *arguments, config=config)


@pytest.mark.parametrize("config", ALL, ids=str)
@pytest.mark.parametrize("counts", [(20, 3, 17), (40, 0, 0), (0, 39, 1), (0, 0, 0)])
def test_weights_and_gains_for_each_modality(config, counts):
    check(LINEAR_ADD_RMS_NORM, linear_add_rms_norm, *inputs(sum(counts), 24, 64, 3, counts, 3), config=config)


@pytest.mark.parametrize(("experts", "gains"), [(1, 3), (3, 1)])
def test_either_alone_for_each_modality(experts, gains):
    arguments = inputs(40, 24, 132, experts, (20, 3, 17), gains)
    check(LINEAR_ADD_RMS_NORM, linear_add_rms_norm, *arguments, config=BOTH[0])


@pytest.mark.parametrize("config", ALL, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15])
def test_tiny_and_huge_rows(config, scale):
    x, *rest = inputs(19, 24, 132, scale=scale, dtype=F32)
    x[::3] = 0  # so that only the residual is left
    check(LINEAR_ADD_RMS_NORM, linear_add_rms_norm, x, *rest, config=config)


@pytest.mark.parametrize("config", ALL, ids=str)
def test_a_residual_of_16_bits(config):
    check(LINEAR_ADD_RMS_NORM, linear_add_rms_norm, *inputs(19, 24, 132, residual_dtype=F16), config=config)


@pytest.mark.parametrize("config", ALL, ids=str)
def test_strided_rows_and_padded_results(config):
    x, weight, experts, residual, *rest = inputs(19, 64, 132)
    wide = torch.cat((residual, residual), dim=1)
    arguments = (x[:, 8:48], weight[:, 16:56], experts, wide[:, 132:], *rest)
    want = check(LINEAR_ADD_RMS_NORM, linear_add_rms_norm, *arguments, config=config)
    memory = [torch.full((19, 144), torch.nan, dtype=dtype, device=DEVICE) for dtype in (F32, F16)]
    out = tuple(each[:, :132] for each in memory)
    linear_add_rms_norm.run(out, workspace(LINEAR_ADD_RMS_NORM, *arguments), *arguments, config=config)
    for one, other, whole in zip(out, want, memory, strict=True):
        assert torch.equal(one, other)
        assert whole[:, 132:].isnan().all()


FP8 = [config(1, columns=128, depth=32, PARTS=2, **more) for more in ({}, {"MORE": 64}, {"MORE": 128})]


@pytest.mark.parametrize("config", FP8, ids=str)
@pytest.mark.parametrize(("experts", "columns"), [(1, 300), (3, 196)])
def test_products_of_codes(config, experts, columns):
    _, _, *rest = inputs(19, 40, columns, experts, (5, 3, 11), experts, dtype=BF16)
    (x, x_scale), (weight, weight_scale) = codes(19, 40), codes(experts * columns, 40, seed=2)
    check(LINEAR_ADD_RMS_NORM, linear_add_rms_norm, x, weight, *rest, x_scale, weight_scale, config=config)
    check(LINEAR_ADD_RMS_NORM, linear_add_rms_norm, x, weight, *rest, None, weight_scale, config=config)


@pytest.mark.parametrize("config", BOTH, ids=str)
@pytest.mark.parametrize("experts", [1, 3])
def test_weights_alone_as_codes(config, experts):
    x, _, *rest = inputs(19, 40, 132, experts, (5, 3, 11), experts)
    weight, weight_scale = codes(experts * 132, 40, seed=2)
    check(LINEAR_ADD_RMS_NORM, linear_add_rms_norm, x, weight, *rest, None, weight_scale, config=config)


def test_a_norm_of_the_branch_is_left_to_the_parts():
    x, weight, experts, residual, _, gain, *rest = inputs(6, 24, 132)
    arguments = (x, weight, experts, residual, gain, gain, *rest)
    assert linear_add_rms_norm.supports(*arguments).startswith("the branch is normed before it is added")
    assert LINEAR_ADD_RMS_NORM.kernel(*arguments) is None


def test_what_the_kernel_does_not_take():
    good = inputs(6, 24, 132)
    for i, change, reason in [
        (0, good[0].float(), "x is neither bfloat16 nor float16"),
        (3, good[3].double(), "float64"),
        (3, good[3][:, :131].contiguous(), "residual or gain cannot be read as they lie"),
        (5, good[5].double(), "float64"),
    ]:
        assert linear_add_rms_norm.supports(*good[:i], change, *good[i + 1 :]) == reason


def test_the_workspace_follows_from_sizes_alone():
    kernel = LINEAR_ADD_RMS_NORM.kernels[0]
    meta = [each.to("meta") if isinstance(each, torch.Tensor) else each for each in inputs(6, 24, 300, 3, (1, 2, 3))]
    assert kernel.workspace(*meta) == LINEAR_ADD_RMS_NORM.workspace(["cuda"], *meta) == 6 * 3 * 4
