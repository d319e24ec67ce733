"""The Triton kernel against float64 on hostile shapes and values: on a GPU, or else in Triton's interpreter."""

import pytest
import torch
from tiles import BF16, BOTH, F16, F32, FP8, codes, config, normal

from exactness import check_codes
from gpu import DEVICE, check, widened
from horsepower.kernels.activation import FP8_GAINS
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu import linear_activation
from horsepower.kernels.linear_activation import LINEAR_ACTIVATION

KINDS = ("swiglu7", "gelu7", "gelu_tanh", "silu")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of the interpreter


def inputs(rows, depth, columns, kind="swiglu7", experts=1, counts=(), dtype=F16):
    """All arguments of the op."""
    return [normal(rows, depth), normal(experts * columns, depth, seed=2), experts, list(counts), kind, dtype]


@pytest.mark.parametrize("config", BOTH, ids=str)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(0, 16, 16), (1, 1, 2), (17, 31, 34), (53, 8, 46)])
def test_odd_and_prime_sizes(config, rows, depth, columns):
    check(LINEAR_ACTIVATION, linear_activation, *inputs(rows, depth, columns), config=config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tma", [0, 1])
def test_kinds_beyond_their_limits(kind, tma):
    x, *rest = inputs(20, 24, 40, kind, dtype=F32)
    (got,) = check(LINEAR_ACTIVATION, linear_activation, x * 4, *rest, config=config(tma))
    u = x.double() * 4 @ rest[0].double().t()
    assert u.max() > 40
    assert u.min() < -40
    (exact,) = LINEAR_ACTIVATION.reference(x.double() * 4, rest[0].double(), 1, [], kind, torch.float64)
    torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("config", BOTH, ids=str)
@pytest.mark.parametrize("counts", [(20, 3, 17), (40, 0, 0), (0, 39, 1), (0, 0, 0)])
def test_a_weight_for_each_modality(config, counts):
    check(LINEAR_ACTIVATION, linear_activation, *inputs(sum(counts), 24, 26, "swiglu7", 3, counts), config=config)


@pytest.mark.parametrize("config", BOTH, ids=str)
def test_strided_rows_and_a_padded_result(config):
    x, weight, *rest = inputs(19, 64, 42)
    x, weight = x[:, 8:48], weight[:, 16:56]
    (want,) = check(LINEAR_ACTIVATION, linear_activation, x, weight, *rest, config=config)
    out = torch.full((19, 32), torch.nan, dtype=F16, device=DEVICE)
    linear_activation.run((out[:, :21],), None, x, weight, *rest, config=config)
    assert torch.equal(out[:, :21], want)
    assert out[:, 21:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_so(kind):
    x, *rest = inputs(6, 16, 16, kind)
    x[3] = torch.nan
    outputs = LINEAR_ACTIVATION.outputs(x, *rest)
    linear_activation.run(outputs, None, x, *rest, config=BOTH[0])
    assert torch.equal(outputs[0].isnan().any(dim=1), torch.arange(6, device=DEVICE) == 3)
    assert outputs[0][3].isnan().all()


def test_what_the_kernel_does_not_take():
    x, weight, *rest = inputs(6, 24, 16)
    assert linear_activation.supports(x.float(), weight, *rest) == "x is neither bfloat16 nor float16"
    assert linear_activation.supports(x, weight, *rest[:-1], torch.float64) == "float64"
    assert (
        linear_activation.supports(x, weight, 1, [], "gelu", F16) == "its error function spills beside a tile of sums"
    )


@pytest.mark.parametrize("tma", [0, 1])
def test_wide_tiles_of_float32_are_stored_in_halves(tma):
    arguments = inputs(19, 24, 300, "silu", dtype=F32)
    check(LINEAR_ACTIVATION, linear_activation, *arguments, config=config(tma, columns=256))


def of_codes(rows, depth, columns, kind="swiglu7", experts=1, counts=(), dtype=BF16, x_dtype=E4M3):
    """All arguments of the op, with e4m3 weights; values of u as far out as the activations' limits."""
    weight, weight_scale = codes(experts * columns, depth, seed=2)
    x, x_scale = codes(rows, depth) if x_dtype is E4M3 else (normal(rows, depth), None)
    return [x, weight, experts, list(counts), kind, dtype, x_scale, weight_scale]


def check_code_outputs(arguments, config):
    outputs = LINEAR_ACTIVATION.outputs(*arguments)
    outputs[0].view(torch.uint8).fill_(0x7F)
    linear_activation.run(outputs, None, *arguments, config=config)
    exact = LINEAR_ACTIVATION.reference(*widened(LINEAR_ACTIVATION, *arguments))[0]
    check_codes(outputs[0], exact * FP8_GAINS[arguments[4]])


@pytest.mark.parametrize("config", FP8, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_codes(config, kind):
    check(LINEAR_ACTIVATION, linear_activation, *of_codes(37, 40, 46, kind), config=config)
    check(LINEAR_ACTIVATION, linear_activation, *of_codes(20, 33, 34, kind, 3, (11, 1, 8)), config=config)


@pytest.mark.parametrize("config", BOTH, ids=str)
@pytest.mark.parametrize("experts", [1, 3])
def test_weights_alone_as_codes(config, experts):
    arguments = of_codes(20, 36, 34, "swiglu7", experts, (11, 1, 8), F16, F16)
    check(LINEAR_ACTIVATION, linear_activation, *arguments, config=config)


@pytest.mark.parametrize("config", [*FP8, BOTH[0]], ids=str)
@pytest.mark.parametrize("kind", FP8_GAINS)
@pytest.mark.parametrize(("experts", "counts"), [(1, ()), (3, (11, 0, 26)), (3, (0, 0, 0))])
def test_results_leave_as_codes(config, kind, experts, counts):
    x_dtype = E4M3 if config in FP8 else F16
    rows = sum(counts) if experts == 3 else 37
    check_code_outputs(of_codes(rows, 40, 46, kind, experts, counts, E4M3, x_dtype), config)


def test_the_largest_result_is_the_largest_code():
    """And what is not a number stays so; codes of other kinds are not bounded."""
    x, weight, *rest = of_codes(6, 32, 32, dtype=E4M3)
    weight = torch.full_like(x[:1].expand(32, 32).float(), 2.0).to(E4M3)
    x = torch.full((6, 32), 448.0, device=DEVICE).to(E4M3)
    x[2] = torch.full((32,), torch.nan).to(E4M3)
    outputs = LINEAR_ACTIVATION.outputs(x, weight, *rest)
    linear_activation.run(outputs, None, x, weight, *rest[:-2], None, torch.ones(32, 1, device=DEVICE), config=FP8[0])
    assert torch.equal(outputs[0].float().isnan().any(dim=1), torch.arange(6, device=DEVICE) == 2)
    assert (outputs[0].float()[[0, 1, 3, 4, 5]] == 448).all()


def test_strided_codes_and_a_padded_result():
    x, weight, *rest = of_codes(19, 64, 42, dtype=E4M3)
    x, weight = x[:, 16:48], weight[:, 16:48]
    out = torch.full((19, 48), 0x7F, dtype=torch.uint8, device=DEVICE).view(E4M3)
    linear_activation.run((out[:, :21],), None, x, weight, *rest, config=FP8[0])
    (want,) = LINEAR_ACTIVATION.outputs(x, weight, *rest)
    linear_activation.run((want,), None, x, weight, *rest, config=FP8[1])
    assert torch.equal(out[:, :21].float(), want.float())
    assert out[:, 21:].float().isnan().all()
