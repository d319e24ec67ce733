"""The Triton kernel against float64 on hostile shapes and values: on a GPU, or else in Triton's interpreter."""

import pytest
import torch
from tiles import F32, codes, config, normal

from exactness import check_codes
from gpu import DEVICE, check, widened
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu import linear_qk_norm_rope
from horsepower.kernels.linear_qk_norm_rope import LINEAR_QK_NORM_ROPE
from horsepower.kernels.rope import paired_order

EPS = 1e-6
BOTH = [config(1, columns=128), config(0, columns=128)]


def inputs(rows, depth=24, heads=(2, 1), others=130, half=48, experts=1, counts=(), scale=1.0):
    """All arguments of the op."""
    x, weight = normal(rows, depth), normal(experts * (sum(heads) * 128 + others), depth, seed=2)
    gains = [1 + 0.3 * normal(experts * 128, dtype=F32, seed=seed) for seed in (3, 4)]
    angles = 10 * normal(rows, half, dtype=F32)
    rope = torch.cat((angles.sin(), angles.cos()), dim=1)
    x.mul_(scale)
    return [x, weight, *gains, rope, experts, list(counts), *heads, 128, EPS, True]


@pytest.mark.parametrize("config", BOTH, ids=str)
@pytest.mark.parametrize(("rows", "depth", "others"), [(0, 16, 8), (1, 1, 1), (17, 31, 130), (37, 40, 0)])
def test_odd_and_prime_sizes(config, rows, depth, others):
    check(LINEAR_QK_NORM_ROPE, linear_qk_norm_rope, *inputs(rows, depth, others=others), config=config)


@pytest.mark.parametrize("heads", [(3, 1), (5, 2), (1, 3)])
@pytest.mark.parametrize("tma", [0, 1])
def test_heads_that_do_not_fill_tiles(heads, tma):
    check(LINEAR_QK_NORM_ROPE, linear_qk_norm_rope, *inputs(19, heads=heads), config=config(tma, columns=256))


@pytest.mark.parametrize("config", BOTH, ids=str)
@pytest.mark.parametrize("counts", [(20, 3, 17), (40, 0, 0), (0, 39, 1)])
def test_weights_and_gains_for_each_modality(config, counts):
    check(LINEAR_QK_NORM_ROPE, linear_qk_norm_rope, *inputs(40, experts=3, counts=counts), config=config)


@pytest.mark.parametrize("config", BOTH, ids=str)
@pytest.mark.parametrize("half", [4, 64])
def test_as_many_dimensions_turn_as_the_table_says(config, half):
    check(LINEAR_QK_NORM_ROPE, linear_qk_norm_rope, *inputs(18, half=half), config=config)


@pytest.mark.parametrize("config", BOTH, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_small_and_large_rows(config, scale):
    check(LINEAR_QK_NORM_ROPE, linear_qk_norm_rope, *inputs(9, scale=scale), config=config)


@pytest.mark.parametrize("config", BOTH, ids=str)
def test_strided_rows_and_padded_results(config):
    x, weight, q_gain, k_gain, rope, *rest = inputs(19, 40)
    table = torch.cat((normal(19, 4, dtype=F32), rope, normal(19, 4, dtype=F32)), dim=1)[:, 4:100]
    arguments = (x[:, 8:35], weight[:, 8:35], q_gain, k_gain, table, *rest)
    want = check(LINEAR_QK_NORM_ROPE, linear_qk_norm_rope, *arguments, config=config)
    memory = torch.full((19, 600), torch.nan, dtype=x.dtype, device=DEVICE)
    out = memory[:, :256].unflatten(1, (2, 128)), memory[:, 264:392].unflatten(1, (1, 128)), memory[:, 400:530]
    linear_qk_norm_rope.run(out, None, *arguments, config=config)
    for one, other in zip(out, want, strict=True):
        assert torch.equal(one, other)
    assert int(memory.isnan().sum()) == 19 * (600 - 256 - 128 - 130)


FP8 = [config(1, columns=128, depth=32), config(1, columns=128, depth=32, MORE=128)]


@pytest.mark.parametrize("config", [*FP8, *BOTH], ids=str)
@pytest.mark.parametrize(("heads", "experts"), [((3, 1), 1), ((2, 1), 3)])
def test_products_of_codes_and_weights_alone_as_codes(config, heads, experts):
    x, _, *rest = inputs(19, 40, heads, experts=experts, counts=(5, 3, 11))
    weight, weight_scale = codes(experts * (sum(heads) * 128 + 130), 40, seed=2)
    x, x_scale = codes(19, 40) if config in FP8 else (x, None)
    check(LINEAR_QK_NORM_ROPE, linear_qk_norm_rope, x, weight, *rest, x_scale, weight_scale, config=config)


@pytest.mark.parametrize("config", FP8, ids=str)
@pytest.mark.parametrize(("heads", "experts"), [((3, 1), 1), ((2, 1), 3)])
def test_heads_leave_as_codes_and_other_columns_as_they_are(config, heads, experts):
    x, _, *rest = inputs(19, 40, heads, experts=experts, counts=(5, 3, 11))
    weight, weight_scale = codes(experts * (sum(heads) * 128 + 130), 40, seed=2)
    x, x_scale = codes(19, 40)
    given = (x, weight, rest[0] * 40, rest[1] * 40, *rest[2:], x_scale, weight_scale, E4M3)
    out = LINEAR_QK_NORM_ROPE.outputs(*given)
    for each in out:
        (each.view(torch.uint8) if each.dtype == E4M3 else each).fill_(0x7F if each.dtype == E4M3 else torch.nan)
    linear_qk_norm_rope.run(out, None, *given, config=config)
    exact = LINEAR_QK_NORM_ROPE.reference(*widened(LINEAR_QK_NORM_ROPE, *given[:-1]))
    for one, other in zip(out[:2], exact, strict=False):
        check_codes(one, other, 1e-4)  # of products whose sums cancel
    torch.testing.assert_close(out[2], exact[2].to(out[2].dtype), rtol=2.0**-7, atol=1e-3)


def test_paired_heads_attend_as_half_split_ones_do():
    x, weight, q_gain, k_gain, rope, *rest = inputs(7)
    order = paired_order(128, rope.shape[1])
    rows = [head * 128 + each for head in range(3) for each in order] + list(range(384, 514))
    paired = [x, weight[rows], q_gain[order], k_gain[order], rope, *rest]
    q, k, others = LINEAR_QK_NORM_ROPE.outputs(*paired)
    linear_qk_norm_rope.run((q, k, others), None, *paired, config=BOTH[0])
    want = LINEAR_QK_NORM_ROPE.reference(x, weight, q_gain, k_gain, rope, *rest[:-1], False)
    scores, wanted = (torch.einsum("lhd,md->hlm", q.double(), k[:, 0].double()) for q, k in ((q, k), want[:2]))
    assert float((scores - wanted).norm() / wanted.norm()) < 2e-3
    torch.testing.assert_close(others, want[2])


def test_what_the_kernel_does_not_take():
    good = inputs(6)
    for i, change, reason in [
        (11, False, "partners do not stand side by side"),
        (9, 64, "a head has 64 dimensions, not 128"),
        (0, good[0].float(), "x is neither bfloat16 nor float16"),
        (2, good[2].double(), "float64"),
        (3, good[3].bfloat16(), "the gains differ in dtype"),
        (4, good[4][:, :0], "table or gains cannot be read as they lie"),
        (4, good[4][:, :92].contiguous(), "table or gains cannot be read as they lie"),
    ]:
        assert linear_qk_norm_rope.supports(*good[:i], change, *good[i + 1 :]) == reason
