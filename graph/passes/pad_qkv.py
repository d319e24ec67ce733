"""For products of eight bits, the QKV projection's outputs become a multiple of 16, as the library's product asks.

Proves: they are added at the end, where a slice drops them.
"""

import operator

import torch

from horsepower.graph.graph import Graph, args_of
from horsepower.kernels.ops import ops

FUSED = ops.linear_qk_norm_rope.default
ROWS = 16


def pad_qkv(graph: Graph) -> None:
    if graph.target == "cpu" or graph.scheme is None or graph.scheme.inputs is None:
        return
    for node in graph.nodes.nodes:
        if node.target is not FUSED:
            continue
        x, weight, q_gain, k_gain, rope, experts, *rest = args_of(node)
        if not (extra := -(weight.meta["val"].shape[0] // experts) % ROWS):
            continue
        with graph.nodes.inserting_before(node):
            padded = graph.call(ops.pad_weight.default, weight, experts, extra, 0, like=weight)
            new = graph.call(FUSED, x, padded, q_gain, k_gain, rope, experts, *rest, like=node)
        for item in list(node.users):
            with graph.nodes.inserting_before(item):
                other = graph.call(operator.getitem, new, args_of(item)[1], like=item)
                if args_of(item)[1] == 2:
                    width = item.meta["val"].shape[1]
                    other = graph.call(torch.ops.aten.slice.Tensor, other, 1, 0, width, like=item)
            graph.replace(item, other)
        graph.take("pad_qkv", new)
