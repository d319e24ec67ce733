"""Clamped SwiGLU and GELU, and torch's GELU and SiLU, widened before and narrowed after, become `activation`.

Proves: the same formula.
"""

import sys

import torch
from torch import fx

from horsepower.graph.graph import Graph, dtype_of
from horsepower.graph.pattern import Call, Hole, after_cast, before_widening
from horsepower.kernels.ops import ops

aten = torch.ops.aten
ACTIVATION = ops.activation.default


def _gated(z: Call) -> Call:
    sigmoid = Call(aten.sigmoid.default, Call(aten.mul.Tensor, z, 1.702))
    return Call(aten.mul.Tensor, z, sigmoid, commutes=True)


def _columns(first: int) -> Call:
    return Call(aten.slice.Tensor, Hole("u"), Hole("last"), first, sys.maxsize, 2)


GELU7 = _gated(Call(aten.clamp.default, Hole("u"), None, 7))
SWIGLU7 = Call(
    aten.mul.Tensor,
    _gated(Call(aten.clamp.default, _columns(0), None, 7)),
    Call(aten.add.Tensor, Call(aten.clamp.default, _columns(1), -7, 7), 1),
    commutes=True,
)


def raise_activation(graph: Graph) -> None:
    for kind, pattern in (("swiglu7", SWIGLU7), ("gelu7", GELU7)):
        for node in graph.nodes.nodes:
            found = pattern.match(node)
            if not found or dtype_of(node) not in (torch.float32, torch.float64):
                continue
            u = found["u"]
            if u.meta["val"].ndim == 0:
                graph.refuse("raise_activation", node, "it is a single number")
                continue
            if kind == "swiglu7" and found["last"] != u.meta["val"].ndim - 1:
                graph.refuse("raise_activation", node, "the pairs are not in the last dimension")
                continue
            last = after_cast(node)
            with graph.nodes.inserting_before(last):
                new = graph.call(ACTIVATION, before_widening(u), kind, dtype_of(last), like=node)
            graph.replace(last, new)
            graph.take("raise_activation", new)
        graph.sweep()
    for node in graph.nodes.nodes:
        if (name := _plain(node)) is not None:
            (given,), last = node.args, after_cast(node)
            if node.meta["val"].ndim == 0:
                graph.refuse("raise_activation", node, "it is a single number")
                continue
            with graph.nodes.inserting_before(last):
                new = graph.call(ACTIVATION, before_widening(given), name, dtype_of(last), like=node)
            graph.replace(last, new)
            graph.take("raise_activation", new)


def _plain(node: fx.Node) -> str | None:
    """The kind of an activation that torch has as one operator."""
    if node.target is aten.silu.default:
        return "silu"
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return None
