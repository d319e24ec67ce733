"""Attention over a sequence of tokens, full or through a window of frames, becomes `attention`.

Proves: the same scores, softmax and sums; heads first or tokens first is a matter of strides.
"""

import torch
from torch import fx

from horsepower.graph.graph import Graph
from horsepower.graph.pattern import Call, Hole
from horsepower.kernels.ops import ops

aten = torch.ops.aten
ATTENTION = ops.attention.default


def _heads_first(name: str) -> Call:
    return Call(aten.unsqueeze.default, Call(aten.transpose.int, Hole(name), 0, 1), 0)


TOKENS_FIRST = Call(aten.transpose.int, Call(aten.select.int, Hole("sdpa"), 0, 0), 0, 1)


def raise_attention(graph: Graph) -> None:
    for node in graph.nodes.nodes:
        if str(node.target) == "horsepower.windowed_attention.default":
            q, k, v, frames, video, window = node.args
        elif (outer := TOKENS_FIRST.match(node)) and _is_sdpa(outer["sdpa"]):
            sdpa = outer["sdpa"]
            holes = [_heads_first("x").match(operand) for operand in sdpa.args]
            if len(holes) != 3 or None in holes or set(sdpa.kwargs) - {"enable_gqa"}:
                graph.refuse("raise_attention", sdpa, "it has a mask, dropout, a causal order, a scale or a batch")
                continue
            q, k, v = (hole["x"] for hole in holes if hole)
            if (
                str(q.meta["val"].shape[::2]) != str(k.meta["val"].shape[::2])
                or k.meta["val"].shape != v.meta["val"].shape
            ):
                graph.refuse("raise_attention", sdpa, "queries, keys and values are not of one sequence")
                continue
            frames, video, window = 1, 0, -1
        else:
            continue
        with graph.nodes.inserting_before(node):
            new = graph.call(ATTENTION, q, k, v, None, 1, [], frames, video, window, like=node)
        graph.replace(node, new)
        graph.take("raise_attention", new)


def _is_sdpa(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.scaled_dot_product_attention.default
