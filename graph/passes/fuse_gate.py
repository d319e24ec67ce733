"""Attention and the sigmoid gate on its heads become one `attention`.

The gate is a column a head, or one value a head (and a modality). Proves: the same product before the same rounding.
"""

import operator
from typing import Any

import torch
from torch import fx

from horsepower.graph.graph import Graph, dtype_of
from horsepower.graph.pattern import Call, Cast, Found, Hole, after_cast
from horsepower.kernels.ops import ops

aten = torch.ops.aten
ATTENTION = ops.attention.default


def _gated(factor: Any, dim: int) -> Call:
    return Call(aten.mul.Tensor, Cast(Hole("o", ATTENTION)), Call(aten.unsqueeze.default, factor, dim), commutes=True)


def _own_rows(index: int) -> Call:
    row = Call(operator.getitem, Call(aten.chunk.default, Call(aten.sigmoid.default, Hole("gate")), 3), index)
    return Call(aten.expand.default, row, [Hole(f"count{index}"), -1])


PER_TOKEN = _gated(Call(aten.sigmoid.default, Cast(Hole("gate"))), 2)
PER_HEAD = _gated(Call(aten.sigmoid.default, Hole("gate")), 1)
PER_MODALITY = _gated(Call(aten.cat.default, [_own_rows(i) for i in range(3)]), 2)


def fuse_gate(graph: Graph) -> None:
    for node in graph.nodes.nodes:
        match = _match(node)
        if not match:
            continue
        found, experts, counts = match
        o = found["o"]
        if o.args[3] is not None or len(o.users) != 1:
            graph.refuse("fuse_gate", node, "the attention has another gate or further uses")
            continue
        if o.meta["val"].ndim != 3:
            graph.refuse("fuse_gate", node, "the attention is over a batch")
            continue
        last = after_cast(node)
        if dtype_of(last) != dtype_of(o):
            graph.refuse("fuse_gate", node, f"the gated heads stay in {dtype_of(last)}")
            continue
        q, k, v, _, _, _, *window = o.args
        with graph.nodes.inserting_before(last):
            new = graph.call(ATTENTION, q, k, v, found["gate"], experts, counts, *window, like=o)
        graph.replace(last, new)
        graph.take("fuse_gate", new)


def _match(node: fx.Node) -> tuple[Found, int, list[Any]] | None:
    for pattern in (PER_TOKEN, PER_HEAD, PER_MODALITY):
        found = pattern.match(node)
        if found:
            rank = found["gate"].meta["val"].ndim
            if pattern is PER_TOKEN and rank == 2:
                return found, 1, []
            if pattern is PER_HEAD and rank == 1:
                return found, 1, []
            if pattern is PER_MODALITY and rank == 1:
                return found, 3, [found[f"count{i}"] for i in range(3)]
    return None
