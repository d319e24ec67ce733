"""Assertions of the trace, casts to the same dtype, slices of everything and idle dropouts go; casts get one form.

Proves: they return their input. Two scatters that fill every other column become one interleaving, which reads nothing
of what it replaces.
"""

import sys
from typing import Any

import torch
from torch import fx

from horsepower.graph.functionalise import is_idle_dropout
from horsepower.graph.graph import Graph, args_of, dtype_of
from horsepower.graph.pattern import Call, Found, Hole

aten = torch.ops.aten
CASTS = (aten.type_as.default, aten.to.dtype_layout, aten.to.device)
ASSERTIONS = ("aten.promote_types", "aten._assert_", "aten.sym_constrain_", "aten.alias")


def _every_other(into: Any, name: str, first: int) -> Call:
    return Call(aten.slice_scatter.default, into, Hole(name), Hole("dim"), first, sys.maxsize, 2)


INTERLEAVED = _every_other(_every_other(Hole("out"), "even", 0), "odd", 1)


def canonicalise(graph: Graph) -> None:
    for node in graph.nodes.nodes:
        _use_plain_cast(node)
        if found := INTERLEAVED.match(node):
            _interleave(graph, node, found)
        if _returns_its_input(node):
            node.replace_all_uses_with(args_of(node)[0])
    for node in list(graph.nodes.nodes):
        if str(node.target).startswith(ASSERTIONS) and not node.users:
            graph.nodes.erase_node(node)


def _use_plain_cast(node: fx.Node) -> None:
    """Let a cast that is spelled in another way, and stays on the device, be `to.dtype`."""
    if node.target not in CASTS or not set(node.kwargs) <= {"dtype", "layout", "device"}:
        return
    if args_of(node)[0].meta["val"].device == node.meta["val"].device:
        node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], dtype_of(node)), {}


def _interleave(graph: Graph, node: fx.Node, found: Found) -> None:
    even, odd = found["even"], found["odd"]
    last = node.meta["val"].ndim - 1
    columns = [x.meta["val"].shape[-1] for x in (even, odd)]
    if found["dim"] != last or any(type(n) is not int for n in columns) or columns[0] != columns[1]:
        return
    with graph.nodes.inserting_before(node):
        pairs = graph.call(aten.stack.default, [even, odd], -1, like=node)
        graph.replace(node, graph.call(aten.flatten.using_ints, pairs, -2, like=node))


def _returns_its_input(node: fx.Node) -> bool:
    source, *options = args_of(node) if node.args else (None,)
    if not isinstance(source, fx.Node):
        return False
    if node.target is aten.to.dtype:
        return len(options) == 1 and not node.kwargs and dtype_of(source) == dtype_of(node)
    if node.target is aten.slice.Tensor:
        _, start, end, step = options + [0, None, None, 1][len(options) :]
        return start in (0, None) and end in (sys.maxsize, None) and step == 1
    return is_idle_dropout(node) or str(node.target).startswith("aten.alias")
