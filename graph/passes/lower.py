"""Each fused op that no single kernel computes becomes its parts: a library matrix product and a native epilogue.

A product over a batch that nothing was fused with is torch's again.
"""

import operator

import torch
from torch import fx

from horsepower.graph.graph import Graph, args_of
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import op_of

aten = torch.ops.aten
LINEAR = ops.linear.default


def lower(graph: Graph) -> None:
    for node in list(graph.nodes.nodes):
        if node.target is LINEAR and args_of(node)[2] == 1 and node.meta["val"].ndim != 2:
            node.target, node.args = aten.linear.default, node.args[:2]  # which takes a batch as it is
            continue
        op = op_of(str(node.target))
        if op is None or op.expand is None or graph.target != "cpu":
            continue

        def call(target, *args, like: fx.Node = node) -> fx.Node:  # type: ignore[no-untyped-def]
            return graph.call(target, *args, like=like)

        with graph.nodes.inserting_before(node):
            parts = op.expand(call, *node.args)
        if op.single:
            graph.replace(node, parts[0])
        else:
            for item in list(node.users):
                assert item.target is operator.getitem
                graph.replace(item, parts[args_of(item)[1]])
