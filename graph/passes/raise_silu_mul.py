"""SiLU of one projection times another, or of its halves, becomes `silu_mul`. Proves: the same product."""

import torch
from torch import fx

from horsepower.graph.graph import Graph, dtype_of
from horsepower.graph.pattern import Call, Hole, after_cast, before_widening
from horsepower.kernels.ops import ops

aten = torch.ops.aten
SILU_MUL = ops.silu_mul.default
GATED = Call(aten.mul.Tensor, Call(aten.silu.default, Hole("gate")), Hole("up"), commutes=True)


def raise_silu_mul(graph: Graph) -> None:
    for node in graph.nodes.nodes:
        found = GATED.match(node)
        if not found or not isinstance(found["up"], fx.Node):
            continue
        gate, up = before_widening(found["gate"]), before_widening(found["up"])
        if str(gate.meta["val"].shape) != str(up.meta["val"].shape):
            graph.refuse("raise_silu_mul", node, "one side is broadcast")
            continue
        if gate.meta["val"].ndim == 0:
            graph.refuse("raise_silu_mul", node, "it is a single number")
            continue
        if dtype_of(gate) != dtype_of(up):
            graph.refuse("raise_silu_mul", node, "the sides differ in dtype")
            continue
        last = after_cast(node)
        with graph.nodes.inserting_before(last):
            new = graph.call(SILU_MUL, gate, up, dtype_of(last), like=node)
        graph.replace(last, new)
        graph.take("raise_silu_mul", new)
