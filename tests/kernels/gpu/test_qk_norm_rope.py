"""The Triton kernel against float64 on hostile shapes and values: on a GPU, or else in Triton's interpreter."""

import pytest
import torch

from exactness import check_codes
from gpu import DEVICE, check
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu import qk_norm_rope
from horsepower.kernels.gpu.launch import Config
from horsepower.kernels.qk_norm_rope import QK_NORM_ROPE

EPS = 1e-6
F32, BF16 = torch.float32, torch.bfloat16
FEW = Config(4, 1, {"HEADS": 2})  # so that queries and keys end within a block of heads


def inputs(rows, dim, half, heads=(3, 2), dtype=F32, experts=1, counts=(), scale=1.0, paired=False):
    """All arguments of the op; the last 5 columns of qkv are no query and no key."""
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(rows, sum(heads) * dim + 5, generator=generator) * scale
    gains = [torch.randn(experts * dim, generator=generator) * 0.3 + 1 for _ in range(2)]
    angles = torch.randn(rows, half, generator=generator) * 10
    rope = torch.cat((angles.sin(), angles.cos()), dim=1)
    tensors = [qkv.to(DEVICE, dtype), *(each.to(DEVICE) for each in (*gains, rope))]
    return [*tensors, experts, list(counts), *heads, EPS, paired]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize(("dim", "half"), [(1, 0), (2, 1), (7, 2), (17, 8), (64, 32), (128, 48), (128, 5)])
def test_odd_and_prime_sizes(paired, rows, dim, half):
    check(QK_NORM_ROPE, qk_norm_rope, *inputs(rows, dim, half, paired=paired), config=FEW)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("heads", [(1, 0), (0, 1), (5, 1), (4, 4), (9, 2)])
def test_heads(paired, heads):
    check(QK_NORM_ROPE, qk_norm_rope, *inputs(3, 24, 8, heads, BF16, paired=paired))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("counts", [(5, 3, 4), (12, 0, 0), (0, 0, 12), (0, 11, 1)])
def test_a_gain_for_each_modality(paired, counts):
    check(QK_NORM_ROPE, qk_norm_rope, *inputs(12, 34, 12, experts=3, counts=counts, paired=paired), config=FEW)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15])
def test_tiny_and_huge(paired, scale):
    check(QK_NORM_ROPE, qk_norm_rope, *inputs(4, 40, 12, scale=scale, paired=paired))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of the interpreter
def test_not_finite_stays_in_its_head(paired):
    arguments = inputs(5, 16, 6, paired=paired)
    arguments[0][1, 7], arguments[0][3, 3 * 16 + 14], arguments[0][4, -1] = torch.nan, torch.inf, torch.nan
    got = QK_NORM_ROPE.outputs(*arguments)
    qk_norm_rope.run(got, None, *arguments)
    for one, other in zip(got, QK_NORM_ROPE.reference(*arguments), strict=True):
        assert torch.equal(one.isnan(), other.isnan())
    assert got[0].isfinite().all(dim=2).logical_not().nonzero().tolist() == [[1, 0]]
    assert got[1].isfinite().all(dim=2).logical_not().nonzero().tolist() == [[3, 0]]


@pytest.mark.parametrize("paired", [False, True])
def test_strided_rows(paired):
    qkv, q_gain, k_gain, rope, *rest = inputs(12, 16, 6, paired=paired)
    check(QK_NORM_ROPE, qk_norm_rope, qkv[::2, 3:], q_gain, k_gain, rope[1::2, :8], *rest)


def test_what_the_kernel_does_not_take():
    good = inputs(6, 16, 6)
    for i, change, reason in [
        (0, good[0].double(), "float64"),
        (3, good[3].double(), "float64"),
        (2, good[2].bfloat16(), "the gains differ in dtype"),
        (0, good[0].T.contiguous().T, "the last dimension is not contiguous"),
    ]:
        assert qk_norm_rope.supports(*good[:i], change, *good[i + 1 :]) == reason


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_heads_leave_as_codes(paired, dtype):
    """What the same gains would give in float32, to the nearest code; some saturate."""
    arguments = inputs(12, 34, 12, dtype=dtype, experts=3, counts=(5, 3, 4), paired=paired)
    for gain in arguments[1:3]:
        gain *= 150
    out = QK_NORM_ROPE.outputs(*arguments, E4M3)
    for each in out:
        each.view(torch.uint8).fill_(0x7F)
    qk_norm_rope.run(out, None, *arguments, E4M3, config=FEW)
    exact = QK_NORM_ROPE.reference(*(x.double() if isinstance(x, torch.Tensor) else x for x in arguments))
    for one, other in zip(out, exact, strict=True):
        check_codes(one, other)
        assert (one.float().abs() == 448).any()
