"""Ceilings, measured where a test can: on a CPU, in small."""

import torch

from horsepower.bench import ceilings


def test_rates_are_work_over_time(monkeypatch):
    """Each candidate is run and its work divided by its time: with given times the rates are known."""
    times = {"memory": 0.5, "matrix": 2.0, "attention": 4.0, "vector": 0.25}

    def paired(candidates, rounds):
        for run in candidates.values():
            run()
        return {name: (times[name],) * rounds for name in candidates}

    monkeypatch.setattr(ceilings, "paired", paired)
    gpu = ceilings.measure(torch.device("cpu"), copied=1000, side=64, tokens=32)
    assert gpu.reached == gpu.peak
    rates = gpu.reached
    assert (rates.memory, rates.matrix, rates.fp8) == (2000, 2 * 64**3 / 2, None)
    assert (rates.attention, rates.vector) == (4 * 40 * 128 * 32**2 / 4, 2 * 16**3 / 0.25)
