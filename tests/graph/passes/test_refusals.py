"""What looks like a site of a pass and is none: left as it is, or taken in part, and computed as eager does."""

import pytest
import torch
import torch.nn.functional as F

from horsepower.graph import passes
from horsepower.graph.capture import capture
from sites import BF16, COLUMNS, Runs, attended, site, values, written_out

FLOAT8 = torch.float8_e4m3fn


def experts(call):
    """`call` on the rows of each modality of x, with its part of what is stacked."""
    return lambda module, x, stacked, *rest: torch.cat(
        [call(part, own, *rest) for part, own in zip(x.split([2, 3, 4]), stacked.chunk(3), strict=True)]
    )


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ((values(9, 8), values(12, 8), values(4)), "it has a bias"),
        ((values(9, 8), values(24)), "its weight is not a matrix"),
    ],
)
def test_products_of_three_experts(inputs, reason):
    taken, refused = site(experts(F.linear), *inputs)
    assert "raise_linear" not in taken
    assert set(refused) == {reason}
    assert site(experts(F.linear), values(9, 8), values(12, 8))[0] == ["raise_linear"]


def test_a_batch_is_no_sequence_of_modalities():
    taken, refused = site(experts(F.linear), values(9, 5, 8), values(12, 8))
    assert taken == ["raise_linear"] * 3  # each by itself
    assert refused == ["a batch is no sequence of modalities"]


def test_the_parts_of_one_row_are_not_experts():
    def run(module, x, stacked):
        parts = zip(x.split([2, 2, 2]), stacked.chunk(3), strict=True)
        return torch.cat([F.linear(part, own) for part, own in parts])

    assert site(run, values(6), values(12, 2))[0] == ["raise_linear"] * 3


def test_a_product_with_a_vector():
    def run(module, x, weight):
        return F.linear(x, weight)

    assert site(run, values(5, 8), values(8)) == ([], ["its weight is not a matrix"])


@pytest.mark.parametrize("mask", [[[True, False, False, False]], [[True], [True], [False], [True]]])
def test_a_mask_that_is_broadcast_is_not_causal(mask):
    x = values(1, 4, 64)
    taken, refused = site(attended(lambda: torch.tensor(mask)), x, x)
    assert taken == []
    assert "the mask is neither causal nor empty" in refused


def test_a_broadcast_mask_that_hides_nothing_goes():
    x = values(1, 4, 64)
    assert site(attended(lambda: torch.tensor([[True]])), x, x)[0] == ["raise_mask", "raise_attention"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_a_norm_is_not_one_with_a_conversion_to_integers(dtype):
    x = values(9, COLUMNS)
    assert site(lambda module, x: written_out(module, x, False).to(dtype) * module.weight, x)[0] == ["raise_rms_norm"]


@pytest.mark.parametrize("between", [torch.float32, torch.float64])
def test_a_gain_that_is_wider_than_the_norm_stays_beside_it(between):
    def run(module, x, gain):
        return written_out(module, x, False).to(between) * gain

    inputs = values(9, COLUMNS), values(COLUMNS).double() / 3
    assert site(run, *inputs)[0] == ["raise_rms_norm"]
    left = [str(node.target) for node in passes.run(capture(Runs(run), inputs)).nodes.nodes]
    assert "aten.mul.Tensor" in left


@pytest.mark.parametrize("dtype", [torch.int32, FLOAT8])
def test_a_branch_is_not_looked_at_through_other_conversions(dtype):
    def run(module, x, y, weight):
        branch = F.linear(y, weight).to(dtype).float()
        return F.rms_norm(branch + x, (COLUMNS,), module.weight, 1e-6)

    taken, refused = site(run, values(9, COLUMNS), values(9, 8), values(COLUMNS, 8))
    assert "fuse_add_norm" not in taken
    assert "neither side of the sum is a projection of its own" in refused


def added(module, residual, branch, weight):
    return F.rms_norm(residual + F.linear(branch, weight), (COLUMNS,), module.weight.to(residual.dtype), 1e-6)


@pytest.mark.parametrize(("residual", "rows"), [((1, COLUMNS), 9), ((9, 1), 9), ((9, COLUMNS), 1)])
def test_a_sum_that_is_broadcast_is_not_fused(residual, rows):
    taken, refused = site(added, values(*residual), values(rows, 8), values(COLUMNS, 8))
    assert "fuse_add_norm" not in taken
    assert "one side of the sum is broadcast" in refused


def turned(module, x, table):
    sin, cos = table.unsqueeze(1).chunk(2, dim=-1)
    a, b, rest = x.split([3, 3, x.shape[-1] - 6], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


@pytest.mark.parametrize(
    ("x", "table", "reason"),
    [
        ((2, 5, 3, 8), (5, 6), "it does not turn [L, H, D] by [L, 2 h]"),
        ((5, 3, 8), (1, 6), "its table is broadcast"),
        ((5, 3, 8), (5, 2), "its table is broadcast"),
    ],
)
def test_a_rotation_in_another_form(x, table, reason):
    assert site(turned, values(5, 3, 8), values(5, 6))[0] == ["raise_rope"]
    assert site(turned, values(*x), values(*table)) == ([], [reason])


def gelu7(x):
    z = x.clamp(max=7)
    return z * torch.sigmoid(1.702 * z)


@pytest.mark.parametrize(
    "function",
    [F.silu, F.gelu, gelu7, lambda x: F.silu(x) * (x + 1), lambda x: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6)],
)
def test_a_single_number_stays_torchs(function):
    taken, refused = site(lambda module, x: function(x.float()).to(BF16), torch.tensor(1.5, dtype=BF16), dtype=BF16)
    assert taken == []
    assert set(refused) == {"it is a single number"}
