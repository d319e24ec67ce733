"""The op against float64 on hostile shapes and values, in every instruction set that this CPU runs."""

import pytest
import torch

from exactness import check_exactness
from horsepower.kernels.native_library import ISAS
from horsepower.kernels.rms_norm import RMS_NORM, native, native_supports, outputs, reference

EPS = 1e-6
F32, BF16 = torch.float32, torch.bfloat16


def inputs(rows, dim, x_dtype=F32, dtype=BF16, experts=1, counts=(), scale=1.0):
    """All arguments of the op."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, dim, generator=generator) * scale
    gain = torch.randn(experts * dim, generator=generator) * 0.3 + 1
    return [x.to(x_dtype), gain, experts, list(counts), EPS, dtype]


def run(isa, *arguments):
    """Outputs are poisoned first: what is not written shows."""
    out = outputs(*arguments)
    out[0].fill_(torch.nan)
    native(out, None, *arguments, isa)
    return out[0]


def check(isa, x, gain, *rest):
    exact = reference(x.double(), gain.double(), *rest[:-1], torch.float64)[0]
    check_exactness(run(isa, x, gain, *rest), reference(x, gain, *rest)[0], exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 61])
@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 257, 1024])
def test_odd_and_prime_sizes(isa, rows, dim):
    check(isa, *inputs(rows, dim))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("x_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dtypes(isa, x_dtype, dtype):
    check(isa, *inputs(13, 250, x_dtype, dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("counts", [(5, 3, 4), (12, 0, 0), (0, 0, 12), (0, 12, 0), (11, 0, 1), (1, 11, 0)])
def test_a_gain_for_each_modality(isa, counts):
    check(isa, *inputs(12, 33, F32, F32, 3, counts))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12, 1e15, 1e25])
def test_tiny_and_huge(isa, scale):
    check(isa, *inputs(9, 100, F32, F32, scale=scale))


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_one_value_and_of_denormals(isa):
    arguments = inputs(4, 64, F32, F32)
    arguments[0][0], arguments[0][1], arguments[0][2] = 3.0, 0.0, 1e-40
    check(isa, *arguments)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_not_finite_stays_in_its_row(isa, dtype):
    arguments = inputs(5, 48, F32, dtype)
    arguments[0][1, 7], arguments[0][3, 0] = torch.nan, torch.inf
    got = run(isa, *arguments)
    assert torch.equal(got.isnan(), reference(*arguments)[0].isnan())
    assert got[[0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_strided_rows(isa):
    x, gain, *rest = inputs(22, 130, BF16)
    check(isa, x[::2, 65:], gain[:65], *rest)


def test_all_instruction_sets_agree():
    results = [run(isa, *inputs(37, 5120, F32, F32, 3, (30, 5, 2))) for isa in ISAS]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-6, atol=0)


@pytest.mark.parametrize(("experts", "counts"), [(1, []), (3, [3, 2, 1])])
def test_the_kernel_is_what_the_registered_op_runs(experts, counts):
    arguments = inputs(6, 40, experts=experts, counts=counts)
    op = torch.ops.horsepower.rms_norm
    torch.library.opcheck(op.default, tuple(arguments))
    assert torch.equal(op(*arguments), run(ISAS[0], *arguments))


def test_what_the_kernel_does_not_take_goes_to_the_reference():
    good = inputs(6, 40, F32, F32)
    assert native_supports(*good) is None
    for i, change, reason in [
        (0, good[0].expand(2, 6, 40), "its rows are not equally far apart"),
        (0, good[0].double(), "neither float32 nor bfloat16"),
        (0, good[0].T.contiguous().T, "the last dimension is not contiguous"),
        (1, good[1].bfloat16(), "gain is not float32"),
        (5, torch.float64, "neither float32 nor bfloat16"),
    ]:
        arguments = [*good[:i], change, *good[i + 1 :]]
        assert native_supports(*arguments) == reason
        torch.testing.assert_close(RMS_NORM(*arguments), reference(*arguments))


@pytest.mark.parametrize(
    ("i", "change", "field"),
    [
        (0, torch.ones(6, 39), "gain"),
        (1, torch.ones(40, 1), "gain"),
        (2, 2, "experts"),
        (2, 3, "counts"),
    ],
)
def test_wrong_inputs_name_the_field(i, change, field):
    good = inputs(6, 40)
    with pytest.raises(ValueError, match=f"^{field}: got"):
        RMS_NORM(*good[:i], change, *good[i + 1 :])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("x_dtype", "dtype"), [(F32, F32), (BF16, F32), (F32, BF16), (BF16, BF16)])
def test_a_batch_without_a_gain(isa, x_dtype, dtype):
    x = torch.randn(3, 5, 34, generator=torch.Generator().manual_seed(0)).to(x_dtype)
    arguments = (x, None, 1, [], 1e-6, dtype)
    out = outputs(*arguments)
    out[0].fill_(torch.nan)
    native(out, None, *arguments, isa=isa)
    exact = reference(x.double(), None, 1, [], 1e-6, torch.float64)[0]
    check_exactness(out[0], reference(*arguments)[0], exact)
    assert native_supports(*arguments) is None
    assert native_supports(x, torch.ones(102), 3, [1, 1, 1], 1e-6, dtype) == "x has 3 dimensions"


def test_cost_counts_each_tensor_once():
    cost = RMS_NORM.cost(*inputs(10, 64))
    assert cost.bytes == 640 * (4 + 2) + 64 * 4
    assert cost.flops == 4 * 640
