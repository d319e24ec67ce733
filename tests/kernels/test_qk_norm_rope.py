"""The op against float64 on hostile shapes and values, in every instruction set that this CPU runs."""

import pytest
import torch

from exactness import check_exactness
from horsepower.kernels.native_library import ISAS
from horsepower.kernels.qk_norm_rope import QK_NORM_ROPE, native, native_supports, outputs, reference
from horsepower.kernels.rope import paired_order

EPS = 1e-6
F32, BF16 = torch.float32, torch.bfloat16


def inputs(rows, dim, half, heads=(3, 2), dtype=BF16, experts=1, counts=(), scale=1.0):
    """All arguments of the op; the last 5 columns of qkv are no query and no key."""
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(rows, sum(heads) * dim + 5, generator=generator) * scale
    q_gain, k_gain = (torch.randn(experts * dim, generator=generator) * 0.3 + 1 for _ in range(2))
    angles = torch.randn(rows, half, generator=generator) * 10
    rope = torch.cat((angles.sin(), angles.cos()), dim=1)
    return [qkv.to(dtype), q_gain, k_gain, rope, experts, list(counts), *heads, EPS, False]


def run(isa, *arguments):
    """Outputs are poisoned first: what is not written shows."""
    out = outputs(*arguments)
    for tensor in out:
        tensor.fill_(torch.nan)
    native(out, None, *arguments, isa)
    return out


def check(isa, *arguments):
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]
    for one in zip(run(isa, *arguments), reference(*arguments), reference(*wide), strict=True):
        check_exactness(*one)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize(
    ("dim", "half"), [(1, 0), (2, 1), (7, 2), (17, 8), (32, 16), (64, 24), (64, 32), (97, 48), (128, 48), (128, 5)]
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_odd_and_prime_sizes(isa, rows, dim, half, dtype):
    check(isa, *inputs(rows, dim, half, dtype=dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("heads", [(1, 0), (0, 1), (1, 1), (5, 1), (4, 4), (7, 2), (16, 1)])
def test_heads(isa, heads):
    check(isa, *inputs(6, 24, 8, heads))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("counts", [(5, 3, 4), (12, 0, 0), (0, 0, 12), (0, 12, 0), (11, 0, 1), (1, 11, 0)])
def test_a_gain_for_each_modality(isa, counts):
    check(isa, *inputs(12, 34, 12, dtype=F32, experts=3, counts=counts))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12, 1e15, 1e25])
def test_tiny_and_huge(isa, scale):
    check(isa, *inputs(9, 40, 12, dtype=F32, scale=scale))


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_one_value_and_of_denormals(isa):
    arguments = inputs(4, 32, 12, dtype=F32)
    arguments[0][0], arguments[0][1], arguments[0][2] = 3.0, 0.0, 1e-40
    check(isa, *arguments)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_not_finite_stays_in_its_head(isa, dtype):
    arguments = inputs(5, 16, 6, dtype=dtype)
    arguments[0][1, 7], arguments[0][3, 3 * 16], arguments[0][4, -1] = torch.nan, torch.inf, torch.nan
    got, eager = run(isa, *arguments), reference(*arguments)
    for one, other in zip(got, eager, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
    assert got[0].isfinite().all(dim=2).logical_not().nonzero().tolist() == [[1, 0]]
    assert got[1].isfinite().all(dim=2).logical_not().nonzero().tolist() == [[3, 0]]


@pytest.mark.parametrize("isa", ISAS)
def test_strided_rows(isa):
    qkv, q_gain, k_gain, rope, *rest = inputs(22, 16, 6)
    check(isa, qkv[::2, 3:], q_gain, k_gain, rope[1::2, :8], *rest)


@pytest.mark.parametrize(("dim", "half"), [(1, 0), (7, 2), (16, 8), (128, 48)])
def test_paired_heads_are_the_same_in_another_order(dim, half):
    qkv, *gains, rope, experts, counts, heads_q, heads_kv, eps, _ = inputs(9, dim, half, experts=3, counts=(4, 0, 5))
    order = paired_order(dim, 2 * half)
    columns = [head * dim + each for head in range(heads_q + heads_kv) for each in order]
    gains = [gain.view(3, dim)[:, order].flatten() for gain in gains]
    rest = (rope, experts, counts, heads_q, heads_kv, eps)
    got = QK_NORM_ROPE(qkv[:, columns], *gains, *rest, True)
    want = reference(*inputs(9, dim, half, experts=3, counts=(4, 0, 5)))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other[..., order])
    assert order[1::2][:half] == list(range(half, 2 * half))


def test_a_paired_order_turns_an_even_number():
    for turned in (3, 18, -2):
        with pytest.raises(ValueError, match="^turned: got"):
            paired_order(16, turned)


def test_all_instruction_sets_agree():
    arguments = inputs(37, 128, 48, (40, 8), F32, 3, (30, 5, 2))
    results = [run(isa, *arguments) for isa in ISAS]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("experts", "counts"), [(1, []), (3, [3, 2, 1])])
def test_the_kernel_is_what_the_registered_op_runs(experts, counts):
    arguments = inputs(6, 16, 6, experts=experts, counts=counts)
    op = torch.ops.horsepower.qk_norm_rope
    torch.library.opcheck(op.default, tuple(arguments))
    for one, other in zip(op(*arguments), run(ISAS[0], *arguments), strict=True):
        assert torch.equal(one, other)


def test_what_the_kernel_does_not_take_goes_to_the_reference():
    good = inputs(6, 16, 6, dtype=F32)
    assert native_supports(*good) is None
    for i, change, reason in [
        (0, good[0].double(), "qkv is neither float32 nor bfloat16"),
        (1, good[1].bfloat16(), "gains and rope are not float32"),
        (3, good[3].double(), "gains and rope are not float32"),
        (0, good[0].T.contiguous().T, "the last dimension is not contiguous"),
        (9, True, "partners stand side by side"),
    ]:
        arguments = [*good[:i], change, *good[i + 1 :]]
        assert native_supports(*arguments) == reason
        torch.testing.assert_close(QK_NORM_ROPE(*arguments), reference(*arguments))


@pytest.mark.parametrize(
    ("i", "change", "field"),
    [
        (0, torch.ones(6), "qkv"),
        (0, torch.ones(6, 79), "qkv"),
        (1, torch.ones(15), "q_gain, k_gain"),
        (2, torch.ones(16, 1), "q_gain, k_gain"),
        (3, torch.ones(5, 12), "rope"),
        (3, torch.ones(6, 11), "rope"),
        (3, torch.ones(6, 18), "rope"),
        (4, 2, "experts"),
        (4, 3, "counts"),
        (10, torch.int8, "dtype"),
    ],
)
def test_wrong_inputs_name_the_field(i, change, field):
    good = inputs(6, 16, 6)
    with pytest.raises(ValueError, match=f"^{field}: got"):
        QK_NORM_ROPE(*good[:i], change, *good[i + 1 :])


def test_cost_counts_each_tensor_once():
    cost = QK_NORM_ROPE.cost(*inputs(10, 16, 6))
    assert cost.bytes == 2 * 10 * 5 * 16 * 2 + 10 * 12 * 4 + 2 * 16 * 4
    assert cost.flops == 4 * 10 * 5 * 16 + 3 * 5 * 10 * 12
