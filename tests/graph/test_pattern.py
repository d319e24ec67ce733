"""Patterns."""

import pytest
import torch
from torch import fx

from horsepower.graph.pattern import Call, Cast, Hole

aten = torch.ops.aten
SILU = Call(aten.mul.Tensor, Hole("x"), Call(aten.sigmoid.default, Hole("x")), commutes=True)


def nodes(build):
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    return x, y, build(graph, x, y)


def negated_cast(dtype, to):
    """A graph's x [3] of one dtype, and neg(x.to(the other))."""
    x, _, node = nodes(lambda g, x, y: g.call_function(aten.neg.default, (g.call_function(aten.to.dtype, (x, to)),)))
    x.meta["val"], node.args[0].meta["val"] = (torch.empty(3, dtype=each, device="meta") for each in (dtype, to))
    return x, node


def test_a_hole_is_the_same_thing_everywhere():
    x, _, node = nodes(
        lambda g, x, y: g.call_function(aten.mul.Tensor, (g.call_function(aten.sigmoid.default, (x,)), x))
    )
    assert SILU.match(node) == {"x": x}
    *_, other = nodes(
        lambda g, x, y: g.call_function(aten.mul.Tensor, (g.call_function(aten.sigmoid.default, (x,)), y))
    )
    assert SILU.match(other) is None


def test_constants_targets_and_the_number_of_arguments_count():
    clamp = Call(aten.clamp.default, Hole("x"), None, 7)
    *_, good = nodes(lambda g, x, y: g.call_function(aten.clamp.default, (x, None, 7)))
    assert clamp.match(good)
    for args in ((0, 7), (None, 6), (None,)):
        *_, node = nodes(lambda g, x, y, args=args: g.call_function(aten.clamp.default, (x, *args)))
        assert clamp.match(node) is None
    *_, keyword = nodes(lambda g, x, y: g.call_function(aten.clamp.default, (x, None, 7), {"out": y}))
    assert clamp.match(keyword) is None
    assert Call(aten.neg.default, Hole("x", aten.clamp.default)).match(good) is None


def test_a_cast_is_optional_and_looked_through():
    pattern = Call(aten.neg.default, Cast(Hole("x")))
    x, _, bare = nodes(lambda g, x, y: g.call_function(aten.neg.default, (x,)))
    assert pattern.match(bare) == {"x": x}
    x, node = negated_cast(torch.bfloat16, torch.float32)
    assert pattern.match(node) == {"x": x}


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_conversion_that_changes_more_than_the_rounding_is_not_a_cast(dtype):
    for dtypes in ((torch.float32, dtype), (dtype, torch.float32)):
        _, node = negated_cast(*dtypes)
        assert Call(aten.neg.default, Cast(Hole("x"))).match(node) == {"x": node.args[0]}
