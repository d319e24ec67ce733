"""What went wrong in compilers before: each is right here, or an error that says so."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import horsepower

D = torch.export.Dim.DYNAMIC


class Function(nn.Module):
    def __init__(self, function, **weights):
        super().__init__()
        self.function = function
        for name, value in weights.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x):
        return self.function(self, x)


def made(function, rows=6, dim=D, **weights):
    torch.manual_seed(0)
    module = Function(function, **weights)
    return module, horsepower.compile(module, (torch.randn(rows, 8),), dynamic_shapes=({0: dim},))


def check(function, *lengths, **weights):
    """At several lengths, twice each, with whatever lay in the arena before gone."""
    module, run = made(function, **weights)
    for rows in lengths:
        for x in (torch.randn(rows, 8), torch.randn(rows, 8)):
            with torch.no_grad():
                want = module(x)
            torch.testing.assert_close(run(x), want)
            for arena in run._run._idle:
                arena._memory.fill_(255)


W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
LENGTHS = {
    "factory": lambda s, x: s.e[torch.arange(x.shape[0])] + x,
    "pad": lambda s, x: F.silu(F.pad(F.linear(x, s.w), (0, 0))),
    "two projections": lambda s, x: (F.pad(F.linear(x, s.w), (0, 0)), F.linear(F.linear(x, s.w), s.w)),
    "zeros": lambda s, x: torch.zeros(x.shape[0], 8) + torch.full((x.shape[0], 1), 2.0) + x,
    "causal": lambda s, x: F.scaled_dot_product_attention(*[x.t().contiguous().t()[None, None]] * 3, is_causal=True),
    "item": lambda s, x: x * x.sum().item(),
    "item of a weight": lambda s, x: x + s.w[0, 0].item(),
}


@pytest.mark.parametrize("function", LENGTHS.values(), ids=LENGTHS)
def test_lengths_and_values_of_the_trace_are_not_baked_in(function):
    check(function, 6, 8, 64, 5, 6, w=W, e=torch.randn(400, 8))


def _late(s, x):
    y = x * 2
    z = y.t().reshape(-1)
    b = x * 3 * 5
    return b.t().reshape(-1) + 0 + z * 1


def test_a_copy_that_is_a_view_at_one_row_is_a_copy():
    check(_late, 5, 1, 2, 1, 0)


def test_chance_is_drawn_at_each_run():
    for function in (lambda s, x: x + torch.randn(8), lambda s, x: x + F.dropout(s.w[0], 0.5, True)):
        _, run = made(function, w=W)
        x = torch.zeros(6, 8)
        assert any(not torch.equal(run(x), run(x)) for _ in range(5))


def _checked(s, x):
    torch._check(x.shape[0] % 2 == 0)
    return x + 1


CONDITIONS = {
    "more than 4": (lambda s, x: x * 2 if x.shape[0] > 4 else x * 3, D, (5, 9), (3, 4)),
    "not 3": (lambda s, x: x * 2 if x.shape[0] != 3 else x * 3, D, (2, 4, 1), (3,)),
    "parts": (lambda s, x: [t + 1 for t in x.split(4)], D, (7, 8), (13, 3)),
    "even": (_checked, D, (2, 4), (3, 5)),
    "range": (lambda s, x: x + 1, torch.export.Dim("rows", min=4, max=8), (4, 8), (3, 100)),
}


@pytest.mark.parametrize(("function", "dim", "good", "bad"), CONDITIONS.values(), ids=CONDITIONS)
def test_sizes_that_take_another_way_are_refused(function, dim, good, bad):
    module, run = made(function, dim=dim)
    again = horsepower.compile(module, (torch.randn(6, 8),), dynamic_shapes=({0: dim},))
    assert again.found
    for each in (run, again):
        for rows in good:
            x = torch.randn(rows, 8)
            torch.testing.assert_close(each(x), module(x))
        for rows in bad:
            with pytest.raises(ValueError, match=rf"inputs: got x_0 = {rows}, allowed: .*x_0"):
                each(torch.randn(rows, 8))


def test_more_threads_than_at_the_first_run():
    x = torch.randn(1, 4, 512, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        module = Function(lambda s, x: F.scaled_dot_product_attention(x, x, x))
        run = horsepower.compile(module, (x,))
        for threads in (1, 8, 2):
            torch.set_num_threads(threads)
            torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_inference_mode_in_and_out():
    module, run = made(lambda s, x: F.linear(x, s.w).relu(), w=W)
    x = torch.randn(6, 8)
    with torch.inference_mode():
        first = run(torch.randn(6, 8))
        assert first.shape == (6, 8)
    with torch.no_grad():
        torch.testing.assert_close(run(x), module(x))
    with torch.inference_mode():
        module, run = made(lambda s, x: F.linear(x, s.w).relu(), w=W.clone())
        torch.testing.assert_close(run(x.clone()), module(x))
    torch.testing.assert_close(run(x), module(x).clone())


class Keywords(nn.Module):
    def forward(self, x, *, a, b):
        return x + a - b


def test_keywords_in_any_order_and_constants_as_they_are():
    x = torch.ones(3)
    run = horsepower.compile(Keywords(), (x,), {"a": x * 2, "b": x * 5})
    assert torch.equal(run(x, b=x * 5, a=x * 2), run(x, a=x * 2, b=x * 5))
    run = horsepower.compile(Keywords(), (x,), {"a": float("nan"), "b": 0.0})
    assert run(x, a=float("nan"), b=0.0).isnan().all()
    with pytest.raises(ValueError, match=r"got -0\.0, allowed: 0\.0"):
        run(x, a=float("nan"), b=-0.0)
