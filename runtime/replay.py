"""A program as one CUDA graph: captured once, then started by a single call."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[list[Any]], list[Any]]

_log = logging.getLogger("horsepower")
_capturing = threading.Lock()  # of a process, torch knows one capture at a time


class Replay:
    """What `run` does with inputs of given sizes, without its work on the CPU.

    Buffers are the graph's own: inputs are copied in, results out.
    """

    def __init__(self, run: Run, given: list[Any], side: torch.cuda.Stream):
        """Capture on a stream that no other work shares; nothing is computed.

        Raises RuntimeError for work that a graph cannot hold, such as a transfer.
        """
        self._given = [x.clone() if isinstance(x, Tensor) else x for x in given]
        self._graph = torch.cuda.CUDAGraph()
        back = torch.cuda.stream(torch.cuda.current_stream())  # torch leaves its stream current if a capture fails
        with (
            _capturing,
            back,
            torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"),  # others may allocate
        ):
            self._results = run(self._given)

    @property
    def bytes(self) -> int:
        """Of the graph's own buffers."""
        return sum(x.nbytes for x in (*self._given, *self._results) if isinstance(x, Tensor))

    def run(self, given: list[Any]) -> list[Any]:
        """The results for inputs of the same sizes."""
        for own, x in zip(self._given, given, strict=True):
            if isinstance(own, Tensor):
                own.copy_(x)
        self._graph.replay()
        return [x.clone() if isinstance(x, Tensor) else x for x in self._results]


def capture(run: Run, given: list[Any], side: torch.cuda.Stream) -> Replay | None:
    """A replay of `run`; None, with the reason in the log, if it cannot be captured."""
    try:
        return Replay(run, given, side)
    except RuntimeError as error:
        _log.warning("the step runs without a CUDA graph: %s", " ".join(str(error).split()))
        return None
