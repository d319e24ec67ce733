"""The rotation of half-split pairs and the cast that follows become `rope`. Proves: the same products and sums."""

import operator
from typing import Any

import torch

from horsepower.graph.graph import Graph, dtype_of
from horsepower.graph.pattern import Call, Found, Hole, after_cast
from horsepower.kernels.ops import ops

aten = torch.ops.aten
ROPE = ops.rope.default


def _item(source: Any, index: int) -> Call:
    return Call(operator.getitem, source, index)


def _mul(a: Any, b: Any) -> Call:
    return Call(aten.mul.Tensor, a, b, commutes=True)


PARTS = Call(aten.split_with_sizes.default, Hole("x"), [Hole("half"), Hole("half"), Hole("rest")], -1)
TABLE = Call(aten.chunk.default, Call(aten.unsqueeze.default, Hole("rope"), 1), 2, -1)
A, B, REST = (_item(PARTS, i) for i in range(3))
SIN, COS = (_item(TABLE, i) for i in range(2))
ROTATED = Call(
    aten.cat.default,
    [
        Call(aten.sub.Tensor, _mul(A, COS), _mul(B, SIN)),
        Call(aten.add.Tensor, _mul(B, COS), _mul(A, SIN), commutes=True),
        REST,
    ],
    -1,
)


def raise_rope(graph: Graph) -> None:
    for node in graph.nodes.nodes:
        if found := ROTATED.match(node):
            if reason := _refusal(found):
                graph.refuse("raise_rope", node, reason)
                continue
            last = after_cast(node)
            with graph.nodes.inserting_before(last):
                new = graph.call(ROPE, found["x"], found["rope"], dtype_of(last), like=node)
            graph.replace(last, new)
            graph.take("raise_rope", new)


def _refusal(found: Found) -> str | None:
    x, table = (found[name].meta["val"].shape for name in ("x", "rope"))
    if len(x) != 3 or len(table) != 2:
        return "it does not turn [L, H, D] by [L, 2 h]"
    if (str(table[0]), str(table[1])) != (str(x[0]), str(2 * found["half"])):
        return "its table is broadcast"
    return None
