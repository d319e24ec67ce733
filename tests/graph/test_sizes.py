import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from horsepower.graph.sizes import evaluate, holds, parse, renamed, symbol

V, A = symbol("video_0"), symbol("audio_0")


@pytest.mark.parametrize(
    ("size", "value"),
    [
        (7, 7),
        (V, 10),
        (2 * V + A - 3, 20),
        (V**2 * 64, 6400),
        (FloorDiv(V, A) + 1, 4),
        (Mod(V, A), 1),
        (Max(V, A) - Min(V, A), 7),
        (-A + V, 7),
    ],
)
def test_a_size_survives_its_text(size, value):
    assert parse(str(size)) == size
    assert evaluate(parse(str(size)), {"video_0": 10, "audio_0": 3}) == value


@pytest.mark.parametrize(
    "text", ["", "1.5", "f(x)", "x.y", "__import__('os')", "'a'", "[1]", "a if b else c", "1 +", "x < 2 < y"]
)
def test_nothing_but_arithmetic_is_read(text):
    with pytest.raises(ValueError, match="size: got"):
        parse(text)


def test_what_no_input_decides_is_an_error():
    assert renamed(V + 1, {V: A}) == A + 1
    with pytest.raises(ValueError, match="video_0 depends on the values"):
        renamed(V + 1, {})
    with pytest.raises(ValueError, match="got no audio_0, video_0"):
        evaluate(V + A, {})


@pytest.mark.parametrize(
    ("condition", "true"),
    [(V > A, True), (sympy.Eq(Mod(V, 2), 0), True), (sympy.Ne(V, 10), False), (FloorDiv(V, A) <= Min(V, 2), False)],
)
def test_a_condition_survives_its_text(condition, true):
    assert parse(str(condition)) == condition
    assert holds(parse(str(condition)), {"video_0": 10, "audio_0": 3}) is true
    with pytest.raises(ValueError, match="sizes: got no"):
        holds(condition, {})
