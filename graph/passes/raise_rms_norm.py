"""RMS norm over the last dimension, or one a modality, with the casts around it, becomes `rms_norm`.

Proves: widening to float32 and norm are one; a narrower result is rounded once.
"""

import torch
from torch import fx

from horsepower.graph.graph import Graph, dtype_of
from horsepower.graph.modality import match_experts
from horsepower.graph.pattern import after_cast, before_widening
from horsepower.kernels.ops import ops

aten = torch.ops.aten
RMS_NORM = ops.rms_norm.default


def raise_rms_norm(graph: Graph) -> None:
    for node in graph.nodes.nodes:
        if experts := match_experts(node, aten.rms_norm.default, weight=2):
            x, gain, counts, call = experts
            _raise(graph, node, x, gain, 3, counts, call)
    graph.sweep()
    for node in graph.nodes.nodes:
        if node.target is aten.rms_norm.default:
            if len(node.args) != 4 or not isinstance(node.args[2], fx.Node):
                graph.refuse("raise_rms_norm", node, "it has no gain or no epsilon")
                continue
            _raise(graph, node, node.args[0], node.args[2], 1, [], node)


def _raise(graph: Graph, node: fx.Node, x, gain, experts: int, counts, call: fx.Node) -> None:  # type: ignore[no-untyped-def]
    if len(call.args[1]) != 1:  # type: ignore[arg-type]
        graph.refuse("raise_rms_norm", node, "it norms more than the last dimension")
        return
    x, last = before_widening(x), after_cast(node)
    if torch.promote_types(dtype_of(x), torch.float32) not in (dtype_of(node), torch.float32):
        graph.refuse("raise_rms_norm", node, f"it is computed in {dtype_of(node)}")
        return
    with graph.nodes.inserting_before(last):
        new = graph.call(RMS_NORM, x, gain, experts, counts, call.args[3], dtype_of(last), like=call)
    graph.replace(last, new)
    graph.take("raise_rms_norm", new)
