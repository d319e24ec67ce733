"""Progress, cancellation and clocks."""

from threading import Event

import pytest
import torch

from horsepower import Cancelled, Progress
from horsepower.runtime.watch import Watch

CPU = torch.device("cpu")


def test_progress_before_the_first_step_and_after_each():
    seen: list[Progress] = []
    watch = Watch(CPU, seen.append)
    assert list(watch.steps("base", 2)) == [0, 1]
    with watch.stage("video"):
        pass
    assert [(p.stage, p.step, p.steps) for p in seen] == [
        ("base", 0, 2), ("base", 1, 2), ("base", 2, 2), ("video", 0, 1), ("video", 1, 1),
    ]  # fmt: skip
    assert list(watch.timings.stages) == ["base", "video"]
    assert all(seconds >= 0 for seconds in watch.timings.stages.values())
    assert watch.timings.peak_memory > 2**20


def test_cancelled_at_the_next_step():
    cancel = Event()
    steps = Watch(CPU, cancel=cancel).steps("base", 5)
    assert [next(steps), next(steps)] == [0, 1]
    cancel.set()
    with pytest.raises(Cancelled, match="step 2 of 5 of stage base"):
        next(steps)
