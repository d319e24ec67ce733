"""The op against float64 on hostile shapes, in every instruction set that this CPU runs."""

import pytest
import torch

from horsepower.kernels.add_rms_norm import ADD_RMS_NORM, native, native_supports, outputs, reference
from horsepower.kernels.native_library import ISAS

EPS = 1e-6
F32, BF16 = torch.float32, torch.bfloat16
ULP = {F32: 2.0**-23, BF16: 2.0**-8}


def inputs(rows, dim, branch_dtype=BF16, experts=1, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    residual, branch = (torch.randn(rows, dim, generator=generator) * scale for _ in range(2))
    gain = torch.randn(experts * dim, generator=generator) * 0.3
    return residual, branch.to(branch_dtype), gain


def run(isa, residual, branch, gain, counts, dtype):
    """Outputs are poisoned first: what is not written shows."""
    out = outputs(residual, branch, gain, counts, EPS, dtype)
    for tensor in out:
        tensor.fill_(torch.nan)
    native(out, residual, branch, gain, counts, EPS, dtype, isa)
    return out


def check(isa, residual, branch, gain, counts, dtype):
    """Not further from float64 than eager, but for a rounding of the output."""
    total, normed = run(isa, residual, branch, gain, counts, dtype)
    assert torch.equal(total, residual + branch)
    exact = reference(residual.double(), branch.double(), gain.double(), counts, EPS, torch.float64)[1]
    eager = reference(residual, branch, gain, counts, EPS, dtype)[1]
    if exact.numel() and exact.norm():
        error, eager_error = (float((x.double() - exact).norm() / exact.norm()) for x in (normed, eager))
        assert error <= max(1.1 * eager_error, 4 * ULP[dtype])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 61])
@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 257, 1024])
def test_odd_and_prime_sizes(isa, rows, dim):
    check(isa, *inputs(rows, dim), [], BF16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("branch_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dtypes(isa, branch_dtype, dtype):
    check(isa, *inputs(13, 250, branch_dtype), [], dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("counts", [(5, 3, 4), (12, 0, 0), (0, 0, 12), (0, 12, 0), (11, 0, 1), (1, 11, 0)])
def test_a_gain_for_each_modality(isa, counts):
    check(isa, *inputs(12, 33, experts=3), counts, F32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15])
def test_tiny_and_huge(isa, scale):
    residual, branch, gain = inputs(9, 100, F32, scale=scale)
    check(isa, residual, branch, gain, [], F32)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_one_value_and_of_denormals(isa):
    residual, branch, gain = inputs(4, 64, F32)
    residual[0], branch[0] = 3.0, 0.0
    residual[1], branch[1] = 0.0, 0.0
    residual[2], branch[2] = 1e-40, 0.0
    check(isa, residual, branch, gain, [], F32)
    assert run(isa, residual, branch, gain, [], F32)[0][2].eq(1e-40).all()


@pytest.mark.parametrize("isa", ISAS)
def test_not_finite_stays_in_its_row(isa):
    residual, branch, gain = inputs(5, 48, F32)
    residual[1, 7], residual[3, 0] = torch.nan, torch.inf
    for dtype in (F32, BF16):
        normed = run(isa, residual, branch, gain, [], dtype)[1]
        eager = reference(residual, branch, gain, [], EPS, dtype)[1]
        assert torch.equal(normed.isnan(), eager.isnan())
        assert normed[[0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_rounds_to_nearest_even(isa):
    """Values that lie exactly between two bfloat16 numbers, through a gain that keeps them."""
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), 1 - 2.0**-9])
    residual = torch.ones(1, 4)
    normed = run(isa, residual, torch.zeros(1, 4), ties - 1, [], F32)[1]
    rounded = run(isa, residual, torch.zeros(1, 4), ties - 1, [], BF16)[1]
    assert torch.equal(rounded, normed.to(BF16))


@pytest.mark.parametrize("isa", ISAS)
def test_strided_rows(isa):
    residual, branch, gain = inputs(22, 130)
    check(isa, residual[::2, :65], branch[1::2, 65:], gain[:65], [], BF16)


def test_all_instruction_sets_agree():
    arguments = inputs(37, 5120, experts=3)
    results = [run(isa, *arguments, (30, 5, 2), F32)[1] for isa in ISAS]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-6, atol=1e-6)


def test_the_registered_op():
    residual, branch, gain = inputs(6, 40, experts=3)
    op = torch.ops.horsepower.add_rms_norm
    torch.library.opcheck(op.default, (residual, branch, gain, [3, 2, 1], EPS, BF16))
    total, normed = op(residual, branch, gain, [3, 2, 1], EPS, BF16)
    assert torch.equal(normed, run(ISAS[0], residual, branch, gain, [3, 2, 1], BF16)[1])
    assert torch.equal(total, residual + branch)


def test_what_the_kernel_does_not_take_goes_to_the_reference():
    residual, branch, gain = inputs(6, 40)
    turned = residual.T.contiguous().T
    assert native_supports(turned, branch, gain) == "the last dimension is not contiguous"
    assert native_supports(residual, branch, gain) is None
    got, want = ADD_RMS_NORM(turned, branch, gain, [], EPS, F32), reference(residual, branch, gain, [], EPS, F32)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"residual": torch.zeros(4, 8, dtype=BF16)}, "residual"),
        ({"residual": torch.zeros(4)}, "residual"),
        ({"branch": torch.zeros(4, 7)}, "branch"),
        ({"branch": torch.zeros(4, 8, dtype=torch.float16)}, "branch"),
        ({"gain": torch.zeros(16)}, "gain"),
        ({"gain": torch.zeros(24), "counts": [4, 1, 0]}, "counts"),
        ({"gain": torch.zeros(24), "counts": [4]}, "counts"),
        ({"dtype": torch.int32}, "dtype"),
    ],
)
def test_wrong_inputs_name_the_field(change, field):
    good = {"residual": torch.zeros(4, 8), "branch": torch.zeros(4, 8), "gain": torch.zeros(8), "counts": []}
    arguments = {**good, "eps": EPS, "dtype": F32} | change
    with pytest.raises(ValueError, match=f"{field}: got"):
        ADD_RMS_NORM(*arguments.values())


def test_cost_counts_each_tensor_once():
    residual, branch, gain = inputs(10, 64)
    cost = ADD_RMS_NORM.cost(residual, branch, gain, [], EPS, BF16)
    assert cost.bytes == 10 * 64 * (4 + 2 + 4 + 2) + 64 * 4
    assert cost.flops == 5 * 640
