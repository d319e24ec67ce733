"""Paired timings: candidates take turns in one run, so that what the machine does meanwhile hits all of them alike."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Name = TypeVar("Name")


@dataclass(frozen=True)
class Ratio:
    """How many times as long one candidate takes as another: median of the rounds' ratios, and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def paired(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 15, warmup: int = 3
) -> dict[str, tuple[float, ...]]:
    """Seconds of each candidate in each round, the order rotated from round to round; warm-up is not counted.

    Raises ValueError without candidates or with fewer than 3 rounds.
    """
    if not candidates or rounds < 3:
        raise ValueError(f"candidates, rounds: got {len(candidates)}, {rounds}, allowed: at least 1 and 3")
    names = list(candidates)
    warm_allocator()
    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in turn(names, i):
            seconds[name].append(seconds_of(candidates[name]))
    return {name: tuple(values) for name, values in seconds.items()}


def turn(names: Sequence[Name], i: int) -> list[Name]:
    """The order of round i: each begins with another one."""
    first = i % len(names)
    return [*names[first:], *names[:first]]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Of two candidates' seconds from one `paired` run."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(numerator, denominator, strict=True)], n=4)
    return Ratio(median, low, high)


def warm_allocator() -> None:
    """Let glibc keep freed memory: else each tensor of a few MB is mapped and its pages zeroed anew on every use.

    Freeing a mapped block raises the allocator's threshold to its size, up to 32 MiB. Without this whoever allocates
    (eager) is slowed by half, and a comparison flatters whoever does not.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def machine(device: str = "cpu") -> str:
    """What a timing has to name: the processor or GPU that it is of, threads, versions."""
    if torch.device(device).type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    return f"{processor}, torch {torch.__version__}, Python {platform.python_version()}"


def seconds_of(run: Callable[[], object]) -> float:
    """Of one run, what it started on a GPU included."""
    _finish()
    start = time.perf_counter()
    run()
    _finish()
    return time.perf_counter() - start


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
