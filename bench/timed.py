"""What the kernels of a plan take on the GPU at hand, each by itself, as a plan runs them."""

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from horsepower.bench.roofline import Kernel, calls_of
from horsepower.bench.tune import Job, Timer, cuda_timer, filled
from horsepower.graph.graph import Graph
from horsepower.kernels.registry import Op
from horsepower.kernels.tables import Candidate


def kernel_seconds(
    graph: Graph, inputs: Sequence[Any], timer: Timer = cuda_timer, device: str = "cuda"
) -> dict[Kernel, float]:  # fmt: skip
    """Medians, of each distinct kernel of our operators in a graph that is lowered for this GPU.

    inputs: flattened, of the sizes to measure, on any device. Values are random; weights come from memory, not from the
    L2 cache. One kernel's inputs are on the device at a time.
    """
    found = {}
    for kernel, (op, given) in calls_of(graph, inputs).items():
        values = filled(Job(op, given, 1), device)
        out, size = op.outputs(*values), op.workspace([device], *values)
        workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
        (seconds,) = timer({Candidate(op.name): partial(_run, op, out, workspace, values)}).values()
        found[kernel] = statistics.median(seconds)
    return found


def _run(op: Op, out: tuple[Tensor, ...], workspace: Tensor | None, values: Sequence[Any]) -> Sequence[Tensor]:
    op.write(out, workspace, *values)
    return out
