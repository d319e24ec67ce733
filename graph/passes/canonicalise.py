"""Assertions of the trace, casts to the same dtype and slices of everything go. Proves: they return their input."""

import sys

import torch
from torch import fx

from horsepower.graph.graph import Graph, args_of, dtype_of

aten = torch.ops.aten
ASSERTIONS = ("aten.promote_types", "aten._assert_", "aten.sym_constrain_", "aten.alias")


def canonicalise(graph: Graph) -> None:
    for node in graph.nodes.nodes:
        if _returns_its_input(node):
            node.replace_all_uses_with(args_of(node)[0])
    for node in list(graph.nodes.nodes):
        if str(node.target).startswith(ASSERTIONS) and not node.users:
            graph.nodes.erase_node(node)


def _returns_its_input(node: fx.Node) -> bool:
    source, *options = args_of(node) if node.args else (None,)
    if not isinstance(source, fx.Node):
        return False
    if node.target is aten.to.dtype:
        return len(options) == 1 and not node.kwargs and dtype_of(source) == dtype_of(node)
    if node.target is aten.slice.Tensor:
        _, start, end, step = options + [0, None, None, 1][len(options) :]
        return start in (0, None) and end in (sys.maxsize, None) and step == 1
    return str(node.target).startswith("aten.alias")
