"""Follows a request: progress to the caller, cancellation at step boundaries, seconds of each stage."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event

import torch

from horsepower.runtime.request import Cancelled, Progress, Timings


class Watch:
    """One request's clock. `on_progress` is called in the thread of the request; `cancel` may be set from any."""

    def __init__(
        self,
        device: torch.device,
        on_progress: Callable[[Progress], None] | None = None,
        cancel: Event | None = None,
    ):
        self._device, self._on_progress, self._cancel = device, on_progress, cancel
        self._seconds: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def steps(self, stage: str, count: int) -> Iterator[int]:
        """Count through a stage's steps. Raises Cancelled before the step that the caller no longer wants."""
        with self.clock(stage):
            for i in range(count):
                self._report(Progress(stage, i, count))
                yield i
            self._report(Progress(stage, count, count))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of one step."""
        for _ in self.steps(name, 1):
            yield

    @property
    def timings(self) -> Timings:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Timings(dict(self._seconds), peak)

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Count what is done to a stage's time."""
        start = self._now()
        yield
        self._seconds[stage] = self._seconds.get(stage, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # not the device: another thread may capture there
        return time.perf_counter()

    def _report(self, progress: Progress) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled(f"cancelled at step {progress.step} of {progress.steps} of stage {progress.stage}")
        if self._on_progress is not None:
            self._on_progress(progress)
