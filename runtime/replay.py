"""A program as one CUDA graph: captured once, then started by a single call."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[list[Any]], list[Any]]

_log = logging.getLogger("horsepower")


class Replay:
    """What `run` does with inputs of given sizes, without its work on the CPU.

    Buffers are the graph's own: inputs are copied in, results out.
    """

    def __init__(self, run: Run, given: list[Any]):
        """Capture; nothing is computed. Raises RuntimeError for work that a graph cannot hold, such as a transfer."""
        self._given = [x.clone() if isinstance(x, Tensor) else x for x in given]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # other threads may go on allocating
            self._results = run(self._given)

    def run(self, given: list[Any]) -> list[Any]:
        """The results for inputs of the same sizes."""
        for own, x in zip(self._given, given, strict=True):
            if isinstance(own, Tensor):
                own.copy_(x)
        self._graph.replay()
        return [x.clone() if isinstance(x, Tensor) else x for x in self._results]


def capture(run: Run, given: list[Any]) -> Replay | None:
    """A replay of `run`; None, with the reason in the log, if it cannot be captured."""
    try:
        return Replay(run, given)
    except RuntimeError as error:
        _log.warning("the step runs without a CUDA graph: %s", " ".join(str(error).split()))
        return None
