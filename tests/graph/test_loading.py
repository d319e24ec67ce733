"""The order of a load: what is taken when, what goes when, and the bytes that this states."""

import torch

from horsepower.graph.call import Call, Ref, Weight
from horsepower.graph.loading import bytes_held, loading
from horsepower.graph.sizes import TensorSpec

CPU = torch.device("cpu")


def spec(n):
    return TensorSpec((n,), (1,), torch.float32, CPU)


def weight(name, n=10):
    return Weight(name, f"module.{name}", spec(n))


def call(result, *reads, n=10, views=False):
    return Call(result, "aten.any.default", tuple(map(Ref, reads)), (), spec(n), views, (), "")


def told(steps):
    return [
        (" ".join(w.value for w in step.takes), step.call and step.call.result, " ".join(sorted(step.frees)))
        for step in steps
    ]


def test_a_weight_goes_before_the_next_is_taken():
    weights = [weight(name) for name in "abcd"]
    calls = [call("a1", "a"), call("b1", "b"), call("a2", "a1"), call("c1", "c"), call("a3", "a")]
    steps = loading(weights, calls, {"a2", "b1", "c1", "a3", "d"})
    assert told(steps) == [
        ("a", "a1", ""),
        ("", "a3", "a"),
        ("", "a2", "a1"),
        ("b", "b1", "b"),
        ("c", "c1", "c"),
        ("d", None, ""),
    ]
    assert bytes_held(steps) == (40 * 5, 40 * 5)  # d comes last, when no other is there beside what was made of it
    assert bytes_held(steps[:3]) == (40 * 3, 40 * 2)


def test_weights_that_meet_wait_for_each_other():
    calls = [call("both", "a", "b"), call("b1", "b")]
    steps = loading([weight("a"), weight("b"), weight("unused")], calls, {"both", "b1"})
    assert told(steps) == [("a b", "both", "a"), ("", "b1", "b")]
    assert told(loading([weight("a")], [call("x", "a")], {"a", "x"})) == [("a", "x", "")]
    assert told(loading([weight("a")], [call("x", "a")], set())) == [("a", "x", "a x")]


def test_what_views_a_weight_keeps_its_memory():
    calls = [call("part", "a", n=4, views=True), call("made", "b", n=1)]
    steps = loading([weight("a", 100), weight("b", 50)], calls, {"part", "made"})
    assert told(steps) == [("a", "part", "a"), ("b", "made", "b")]
    assert bytes_held(steps) == (4 * (100 + 50 + 1), 4 * (100 + 1))
