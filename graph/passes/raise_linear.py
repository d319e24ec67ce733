"""A matrix product without a bias, or one a modality, becomes `linear`. Proves: the same products of the same rows."""

import torch
from torch import fx

from horsepower.graph.graph import Graph, args_of
from horsepower.graph.modality import match_experts
from horsepower.kernels.ops import ops

aten = torch.ops.aten
LINEAR = ops.linear.default


def raise_linear(graph: Graph) -> None:
    for node in graph.nodes.nodes:
        if experts := match_experts(node, aten.linear.default, weight=1):
            batch = None if experts.x.meta["val"].ndim == 2 else "a batch is no sequence of modalities"
            if reason := batch or _refusal(experts.first):
                graph.refuse("raise_linear", node, reason)
                continue
            with graph.nodes.inserting_before(node):
                new = graph.call(LINEAR, experts.x, experts.stacked, 3, experts.counts, like=experts.first)
            graph.replace(node, new)
            graph.take("raise_linear", new)
    graph.sweep()
    for node in graph.nodes.nodes:
        if node.target is aten.linear.default and not node.kwargs:
            if reason := _refusal(node):
                graph.refuse("raise_linear", node, reason)
                continue
            with graph.nodes.inserting_before(node):
                new = graph.call(LINEAR, *node.args[:2], 1, [], like=node)
            graph.replace(node, new)
            graph.take("raise_linear", new)


def _refusal(linear: fx.Node) -> str | None:
    _, weight, *bias = args_of(linear)
    if bias not in ([], [None]):
        return "it has a bias"
    return None if weight.meta["val"].ndim == 2 else "its weight is not a matrix"
