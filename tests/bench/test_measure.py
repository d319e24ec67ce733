"""Measuring: order, counts and ratios; never how long something takes."""

import pytest

from horsepower.bench.measure import machine, paired, ratio


def test_candidates_take_turns():
    calls = []
    candidates = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = paired(candidates, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 3)
    assert all(value > 0 for values in seconds.values() for value in values)


def test_a_ratio_is_of_rounds_not_of_sums():
    found = ratio([2.0, 4.0, 60.0], [1.0, 2.0, 20.0])
    assert found.median == 2.0
    assert found.low <= found.median <= found.high
    assert str(found).startswith("2.000 (")


def test_too_little_to_measure():
    with pytest.raises(ValueError, match="rounds: got 1, 2"):
        paired({"a": int}, rounds=2)
    with pytest.raises(ValueError, match="candidates"):
        paired({})


def test_the_machine_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # a GPU that is there but not measured is not named
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU {device}")
    assert "GPU" not in machine()
    assert "threads" in machine()
    assert machine("cuda:1").startswith("GPU cuda:1")
    assert "torch" in machine()
    assert "Python" in machine()
