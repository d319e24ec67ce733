"""Layer norm over the last dimension, with the casts around it, becomes `layer_norm`.

Proves: widening to float32 and norm are one; a narrower result is rounded once.
"""

import torch
from torch import fx

from horsepower.graph.graph import Graph, dtype_of
from horsepower.graph.pattern import after_cast, before_widening, widened
from horsepower.kernels.ops import ops

aten = torch.ops.aten
LAYER_NORM = ops.layer_norm.default


def raise_layer_norm(graph: Graph) -> None:
    for node in graph.nodes.nodes:
        if node.target is not aten.layer_norm.default or node.kwargs:
            continue
        given, shape, weight, bias, eps = [*node.args, None, None, 1e-5][: max(5, len(node.args))][:5]
        if not isinstance(given, fx.Node) or len(shape) != 1:
            graph.refuse("raise_layer_norm", node, "it norms more than the last dimension")
            continue
        if weight is None and bias is not None:
            graph.refuse("raise_layer_norm", node, "it has a bias and no weight")
            continue
        x, last = before_widening(given), after_cast(node)
        if x is given and last is node and dtype_of(node) == torch.bfloat16:
            graph.refuse("raise_layer_norm", node, "torch's own is as fast for bfloat16")
            continue
        own = [widened(graph, each) for each in (weight, bias)]
        with graph.nodes.inserting_before(last):
            new = graph.call(LAYER_NORM, x, *own, eps, dtype_of(last), like=node)
        graph.replace(last, new)
        graph.take("raise_layer_norm", new)
