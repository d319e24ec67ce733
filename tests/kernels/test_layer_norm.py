"""The op against float64 on hostile shapes and values, in every instruction set that this CPU runs."""

import pytest
import torch

from exactness import check_exactness
from horsepower.kernels.layer_norm import LAYER_NORM, native, native_supports, outputs, reference
from horsepower.kernels.native_library import ISAS

F32, BF16 = torch.float32, torch.bfloat16


def values(*shape, dtype=F32, scale=1.0, offset=0.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + offset).to(dtype)


def own(columns, count):
    """No weights, one, or weight and bias."""
    return (*(values(columns, seed=i + 1) for i in range(count)), None, None)[:2]


def run(isa, x, weight, bias, dtype, eps=1e-6):
    """Outputs are poisoned first: what is not written shows."""
    out = outputs(x, weight, bias, eps, dtype)
    out[0].fill_(torch.nan)
    native(out, None, x, weight, bias, eps, dtype, isa)
    return out[0]


def check(isa, x, weight, bias, dtype, eps=1e-6):
    wide = [None if each is None else each.double() for each in (x, weight, bias)]
    exact = reference(*wide, eps, torch.float64)[0]
    check_exactness(run(isa, x, weight, bias, dtype, eps), reference(x, weight, bias, eps, dtype)[0], exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (7, 14), (3, 257), (2, 5, 34), (2, 1360)])
def test_odd_and_prime_sizes(isa, count, shape):
    check(isa, values(*shape), *own(shape[-1], count), F32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("x_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dtypes(isa, x_dtype, dtype):
    check(isa, values(13, 250, dtype=x_dtype), *own(250, 2), dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("scale", "offset"), [(1e-20, 0), (1e-3, 0), (1e4, 0), (1e17, 0), (1, 1e3), (1e-2, 30)])
def test_tiny_huge_and_far_from_zero(isa, scale, offset):
    check(isa, values(9, 100, scale=scale, offset=offset), *own(100, 2), F32)


@pytest.mark.parametrize("isa", ISAS)
def test_strided_rows_and_equal_values(isa):
    check(isa, values(22, 131)[::2, 1:67], *own(66, 2), F32)
    weight, bias = own(16, 2)
    assert torch.equal(run(isa, torch.full((3, 16), 2.0), weight, bias, F32), bias.expand(3, 16))


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_stays_in_its_row(isa):
    x = values(6, 40)
    x[1, 3], x[4, 0] = torch.nan, torch.inf
    got = run(isa, x, None, None, F32)
    assert got[[1, 4]].isnan().all()
    assert torch.equal(got[[0, 2, 3, 5]], run(isa, x[[0, 2, 3, 5]], None, None, F32))


def test_the_kernel_is_what_the_registered_op_runs():
    x = values(6, 40, dtype=BF16)
    torch.library.opcheck(torch.ops.horsepower.layer_norm.default, (x, *own(40, 2), 1e-6, BF16))
    assert torch.equal(torch.ops.horsepower.layer_norm(x, *own(40, 2), 1e-6, BF16), run(ISAS[0], x, *own(40, 2), BF16))


@pytest.mark.parametrize(
    ("x", "dtype", "reason"),
    [
        (torch.ones(2, 3, 8)[:, :2], F32, "its rows are not equally far apart"),
        (torch.ones(8, 8).T, F32, "the last dimension is not contiguous"),
        (torch.ones(4, 8, dtype=torch.float64), F32, "neither float32 nor bfloat16"),
        (torch.ones(4, 8), torch.float64, "neither float32 nor bfloat16"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_the_reference(x, dtype, reason):
    assert native_supports(x, None, None, 1e-6, dtype) == reason
    torch.testing.assert_close(LAYER_NORM(x, None, None, 1e-6, dtype), reference(x, None, None, 1e-6, dtype))


def test_weights_of_another_dtype_go_to_the_reference():
    weight = torch.ones(8, dtype=BF16)
    assert native_supports(torch.ones(4, 8), weight, None, 1e-6, F32) == "weight or bias is not float32"


def test_wrong_inputs_name_the_field():
    with pytest.raises(ValueError, match=r"^weight: got \[7\], allowed: \[8\]"):
        LAYER_NORM(torch.ones(2, 8), torch.ones(7), None, 1e-6, F32)
    with pytest.raises(ValueError, match="^bias: got one without a weight"):
        LAYER_NORM(torch.ones(2, 8), None, torch.ones(8), 1e-6, F32)


def test_cost_counts_each_tensor_once():
    cost = LAYER_NORM.cost(values(10, 64), *own(64, 2), 1e-6, BF16)
    assert (cost.bytes, cost.flops) == (640 * 6 + 2 * 256, 4480)
