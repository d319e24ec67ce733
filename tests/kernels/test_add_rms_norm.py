"""The op against float64 on hostile shapes, in every instruction set that this CPU runs."""

import pytest
import torch

from exactness import check_exactness
from horsepower.kernels.add_rms_norm import ADD_RMS_NORM, native, native_supports, outputs, reference
from horsepower.kernels.native_library import ISAS

EPS = 1e-6
F32, BF16 = torch.float32, torch.bfloat16


def inputs(rows, dim, branch_dtype=BF16, experts=1, post_experts=0, scale=1.0, seed=1):
    """residual, branch, post_gain (None without experts of its own) and gain."""
    generator = torch.Generator().manual_seed(seed)
    residual, branch = (torch.randn(rows, dim, generator=generator) * scale for _ in range(2))
    gain, post_gain = (torch.randn(n * dim, generator=generator) * 0.3 + 1 for n in (experts, post_experts))
    return residual, branch.to(branch_dtype), post_gain if post_experts else None, gain


def run(isa, residual, branch, post_gain, gain, counts, dtype):
    """Outputs are poisoned first: what is not written shows."""
    out = outputs(residual, branch, post_gain, gain, counts, EPS, dtype)
    for tensor in out:
        tensor.fill_(torch.nan)
    native(out, None, residual, branch, post_gain, gain, counts, EPS, dtype, isa)
    return out


def check(isa, residual, branch, post_gain, gain, counts, dtype):
    got = run(isa, residual, branch, post_gain, gain, counts, dtype)
    if post_gain is None:
        assert torch.equal(got[0], residual + branch)
    eager = reference(residual, branch, post_gain, gain, counts, EPS, dtype)
    wide = [None if x is None else x.double() for x in (residual, branch, post_gain, gain)]
    for one in zip(got, eager, reference(*wide, counts, EPS, torch.float64), strict=True):
        check_exactness(*one)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 61])
@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 257, 1024])
@pytest.mark.parametrize("post_experts", [0, 1])
def test_odd_and_prime_sizes(isa, rows, dim, post_experts):
    check(isa, *inputs(rows, dim, post_experts=post_experts), [], BF16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("branch_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("post_experts", [0, 1])
def test_dtypes(isa, branch_dtype, dtype, post_experts):
    check(isa, *inputs(13, 250, branch_dtype, post_experts=post_experts), [], dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("counts", [(5, 3, 4), (12, 0, 0), (0, 0, 12), (0, 12, 0), (11, 0, 1), (1, 11, 0)])
@pytest.mark.parametrize(("experts", "post_experts"), [(3, 0), (3, 1), (1, 3), (3, 3)])
def test_a_gain_for_each_modality(isa, counts, experts, post_experts):
    check(isa, *inputs(12, 33, experts=experts, post_experts=post_experts), counts, F32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15, 1e25])
@pytest.mark.parametrize("post_experts", [0, 1])
def test_tiny_and_huge(isa, scale, post_experts):
    check(isa, *inputs(9, 100, F32, post_experts=post_experts, scale=scale), [], F32)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_one_value_and_of_denormals(isa):
    residual, branch, post_gain, gain = inputs(4, 64, F32)
    residual[0], branch[0] = 3.0, 0.0
    residual[1], branch[1] = 0.0, 0.0
    residual[2], branch[2] = 1e-40, 0.0
    check(isa, residual, branch, post_gain, gain, [], F32)
    assert run(isa, residual, branch, post_gain, gain, [], F32)[0][2].eq(1e-40).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("post_experts", [0, 1])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_not_finite_stays_in_its_row(isa, post_experts, dtype):
    residual, branch, post_gain, gain = inputs(5, 48, F32, post_experts=post_experts)
    residual[1, 7], residual[3, 0], branch[3, 9], branch[4, 2] = torch.nan, torch.inf, -torch.inf, torch.nan
    got = run(isa, residual, branch, post_gain, gain, [], dtype)
    eager = reference(residual, branch, post_gain, gain, [], EPS, dtype)
    for one, other in zip(got, eager, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert one[[0, 2]].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_rounds_to_nearest_even(isa):
    """Values that lie exactly between two bfloat16 numbers, through a gain that keeps them."""
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), 1 - 2.0**-9])
    residual = torch.ones(1, 4)
    normed = run(isa, residual, torch.zeros(1, 4), None, ties, [], F32)[1]
    rounded = run(isa, residual, torch.zeros(1, 4), None, ties, [], BF16)[1]
    assert torch.equal(rounded, normed.to(BF16))


@pytest.mark.parametrize("isa", ISAS)
def test_strided_rows(isa):
    residual, branch, post_gain, gain = inputs(22, 130, post_experts=1)
    check(isa, residual[::2, :65], branch[1::2, 65:], None, gain[:65], [], BF16)
    check(isa, residual[::2, :65], branch[1::2, 65:], post_gain[65:], gain[:65], [], BF16)


def test_all_instruction_sets_agree():
    arguments = inputs(37, 5120, experts=3, post_experts=1)
    results = [run(isa, *arguments, (30, 5, 2), F32)[1] for isa in ISAS]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("post_experts", [0, 1, 3])
def test_the_registered_op(post_experts):
    arguments = (*inputs(6, 40, experts=3, post_experts=post_experts), [3, 2, 1])
    op = torch.ops.horsepower.add_rms_norm
    torch.library.opcheck(op.default, (*arguments, EPS, BF16))
    for one, other in zip(op(*arguments, EPS, BF16), run(ISAS[0], *arguments, BF16), strict=True):
        assert torch.equal(one, other)


def test_what_the_kernel_does_not_take_goes_to_the_reference():
    residual, branch, _, gain = inputs(6, 40)
    assert native_supports(residual, branch, None, gain, [], EPS, BF16) is None
    for rest, reason in [
        ((residual.T.contiguous().T, branch, gain, [], EPS, F32), "the last dimension is not contiguous"),
        ((residual.bfloat16(), branch, gain, [], EPS, F32), "residual and gains are not float32"),
        ((residual, branch, gain.double(), [], EPS, F32), "residual and gains are not float32"),
        ((residual, branch, gain, [], EPS, torch.float64), "float64"),
        ((residual, branch.double(), gain, [], EPS, F32), "float64"),
        ((residual, branch.half(), gain, [], EPS, F32), "float16"),
    ]:
        arguments = (*rest[:2], None, *rest[2:])
        assert native_supports(*arguments) == reason
        got, want = ADD_RMS_NORM(*arguments), reference(*arguments)
        torch.testing.assert_close(got, want)
        assert [x.dtype for x in got] == [x.dtype for x in outputs(*arguments)]


def test_symbolic_rows_are_not_fixed():
    """The shape rule may compare only what is known: a comparison would make the exported graph's size a constant."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment):
        rows, other = environment.create_unbacked_symint(), environment.create_unbacked_symint()
        total, normed = torch.ops.horsepower.add_rms_norm(
            torch.empty(rows, 8), torch.empty(other, 8), torch.empty(24), torch.empty(8), [rows, 0, 0], EPS, BF16
        )
    assert total.shape[0] is not other
    assert normed.shape[1] == 8
    assert str(normed.shape[0]) == str(rows)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"residual": torch.zeros(4, 8, dtype=torch.int32)}, "residual"),
        ({"residual": torch.zeros(4)}, "residual"),
        ({"branch": torch.zeros(4, 7)}, "branch"),
        ({"branch": torch.zeros(4, 8, dtype=torch.int32)}, "branch"),
        ({"gain": torch.zeros(16)}, "gain"),
        ({"gain": torch.zeros(8, dtype=torch.int64)}, "gain"),
        ({"post_gain": torch.zeros(7)}, "post_gain"),
        ({"post_gain": torch.zeros(24)}, "counts"),
        ({"gain": torch.zeros(24), "counts": [6, -2, 0]}, "counts"),
        ({"gain": torch.zeros(24), "counts": [4, 1, 0]}, "counts"),
        ({"gain": torch.zeros(24), "counts": [4]}, "counts"),
        ({"dtype": torch.int32}, "dtype"),
    ],
)
def test_wrong_inputs_name_the_field(change, field):
    tensors = {"residual": torch.zeros(4, 8), "branch": torch.zeros(4, 8), "post_gain": None, "gain": torch.zeros(8)}
    arguments = {**tensors, "counts": [], "eps": EPS, "dtype": F32} | change
    with pytest.raises(ValueError, match=f"^{field}: got"):
        ADD_RMS_NORM(*arguments.values())


def test_cost_counts_each_tensor_once():
    cost = ADD_RMS_NORM.cost(*inputs(10, 64), [], EPS, BF16)
    assert cost.bytes == 10 * 64 * (4 + 2 + 4 + 2) + 64 * 4
    assert cost.flops == 5 * 640
    cost = ADD_RMS_NORM.cost(*inputs(10, 64, post_experts=3), [4, 4, 2], EPS, BF16)
    assert cost.bytes == 10 * 64 * (4 + 2 + 4 + 2) + 4 * 64 * 4
    assert cost.flops == 9 * 640
