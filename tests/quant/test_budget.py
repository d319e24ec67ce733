"""The error of a layer, on inputs whose error is known."""

import math

import pytest
import torch

from horsepower.kernels.quantise import QUANTISE
from horsepower.quant import budget
from horsepower.quant.budget import BUDGET, Rows, fewest, product_error
from horsepower.quant.sampling import sample


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(x, codes=True, counts=None):
    return Rows(x, counts or (len(x), 0, 0), *(QUANTISE(x) if codes else ()))


X, W = normal(256, 1024), (normal(512, 1024, seed=1) / 32).bfloat16()


def test_normal_operands_cost_what_the_budget_says():
    both, weights = product_error(rows(X), W, 1), product_error(rows(X, codes=False), W, 1)
    assert both.scheme == pytest.approx(0.037, abs=0.001)
    assert weights.scheme == pytest.approx(0.026, abs=0.001)
    assert both.own == weights.own < 0.003
    assert both.scheme < 0.7 * BUDGET


def test_a_sum_that_cancels_is_over_budget():
    """Inputs share a large part to which the weight is blind."""
    shared = normal(1024, seed=2)
    blind = W.float() - (W.float() @ shared)[:, None] * shared / shared.square().sum()
    for size, over in ((0.3, False), (3, True)):
        error = product_error(rows(X + size * shared), blind.bfloat16(), 1)
        assert (error.scheme > BUDGET) == over
        assert error.own < error.scheme / 8


def test_one_value_above_all_others_leaves_them_without_bits():
    x, weight = X.clone(), W.clone()
    x[:, 5], weight[:, 5] = 1e6, 0
    assert product_error(rows(x), weight, 1).scheme > 0.5
    assert product_error(rows(x, codes=False), weight, 1).scheme < 0.03


def test_a_static_scale_goes_into_the_weights():
    codes = (X * 8).to(torch.float8_e4m3fn)
    error = product_error(Rows(X, (len(X), 0, 0), codes, None, 1 / 8), W, 1)
    assert error.scheme == pytest.approx(0.037, abs=0.001)


def test_each_modality_has_its_own_part():
    counts = (100, 0, 156)
    together = product_error(rows(X, counts=counts), torch.cat((W, 2 * W, -3 * W)), 3)
    parts = [product_error(rows(part), own, 1) for part, own in ((X[:100], W), (X[100:], -3 * W))]
    assert min(e.scheme for e in parts) < together.scheme < max(e.scheme for e in parts)
    wrong = product_error(rows(X, counts=counts), torch.cat((W, W, 0 * W)), 3)
    assert wrong.scheme == pytest.approx(parts[0].scheme)


def test_blocks_do_not_show(monkeypatch):
    whole = product_error(rows(X), W, 1)
    monkeypatch.setattr(budget, "BLOCK", 3 * 1024)
    assert product_error(rows(X), W, 1).scheme == pytest.approx(whole.scheme, rel=1e-9)


def test_what_has_no_error_and_what_has_no_number():
    assert product_error(rows(0 * X), W, 1) == product_error(rows(X), 0 * W, 1) == budget.ProductError(0.0, 0.0)
    broken = W.clone()
    broken[3, 4] = torch.nan
    assert product_error(rows(X), broken, 1) == budget.ProductError(math.inf, math.inf)


@pytest.mark.parametrize("least", [0, 1, 5, 11, 12, None])
def test_the_fewest_that_hold(least):
    asked = []

    def holds(n):
        asked.append(n)
        return least is not None and n >= least

    assert fewest(12, holds) == least
    assert len(asked) == len(set(asked)) <= 6


def test_none_can_be_kept():
    assert fewest(0, lambda n: False) is None
    assert fewest(0, lambda n: True) == 0


def test_samples_hold_the_edges_and_say_what_is_whose():
    generator = torch.Generator().manual_seed(0)
    at, counts = sample((100, 1, 50), 20, generator)
    assert at.tolist() == sorted(set(at.tolist()))
    assert {0, 99, 100, 101, 150} <= set(at.tolist())
    assert counts == (sum(at < 100), 1, sum(at > 100))
    assert len(at) == sum(counts) == 20
    other, _ = sample((100, 1, 50), 20, generator)
    again, _ = sample((100, 1, 50), 20, torch.Generator().manual_seed(0))
    assert other.tolist() != at.tolist() == again.tolist()


def test_samples_of_few_rows_are_all_of_them():
    at, counts = sample((3, 0, 2), 256, torch.Generator())
    assert (at.tolist(), counts) == ([0, 1, 2, 3, 4], (3, 0, 2))
    with pytest.raises(ValueError, match="rows: got 2, allowed: at least 4, the edges"):
        sample((3, 0, 2), 2, torch.Generator())
