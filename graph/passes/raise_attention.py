"""Attention over a sequence or a batch, to itself or another, full or through a window of frames, becomes `attention`.

Proves: the same scores, softmax and sums; heads first or tokens first is a matter of strides, and a head that is
repeated for several queries is the one that they share.
"""

from typing import Any

import torch
from torch import fx

from horsepower.graph.graph import Graph
from horsepower.graph.passes.raise_mask import NAMES, sdpa_options
from horsepower.graph.pattern import Call, Hole
from horsepower.kernels.ops import ops

aten = torch.ops.aten
ATTENTION = ops.attention.default


def _heads_first(name: str) -> Call:
    return Call(aten.unsqueeze.default, Call(aten.transpose.int, Hole(name), 0, 1), 0)


TOKENS_FIRST = Call(aten.transpose.int, Call(aten.select.int, Hole("sdpa"), 0, 0), 0, 1)
HEADS_FIRST = (
    Call(aten.transpose.int, Hole("x"), 1, 2),
    Call(aten.transpose.int, Hole("x"), 2, 1),
    Call(aten.permute.default, Hole("x"), [0, 2, 1, 3]),
)
REPEATED = Call(aten.expand.default, Call(aten.unsqueeze.default, Hole("x"), 2), Hole("sizes"))
REPEATED_HEADS = Call((aten.reshape.default, aten.flatten.using_ints), REPEATED, Hole("shape"))


def raise_attention(graph: Graph) -> None:
    for node in list(graph.nodes.nodes):
        if str(node.target) == "horsepower.windowed_attention.default":
            q, k, v, frames, video, window = node.args
            new = _call(graph, node, q, k, v, frames, video, window)
            graph.replace(node, new)
            graph.take("raise_attention", new)
        elif _is_sdpa(node):
            if reason := _refusal(node):
                graph.refuse("raise_attention", node, reason)
            else:
                _raise(graph, node)


def _refusal(sdpa: fx.Node) -> str | None:
    options = sdpa_options(sdpa)
    q, k, v = (options[name].meta["val"] for name in NAMES[:3])  # type: ignore[attr-defined]
    scale = options.get("scale")
    if options["attn_mask"] is not None or options["is_causal"] or options["dropout_p"]:
        return "it has a mask, a causal order or dropout"
    if scale is not None and abs(scale * q.shape[-1] ** 0.5 - 1) > 1e-6:
        return "its scale is not 1 / sqrt(head dim)"
    if q.ndim != 4 or str(k.shape) != str(v.shape) or any(str(x.shape[0]) != str(q.shape[0]) for x in (k, v)):
        return "queries, keys and values are not [B, heads, tokens, D]"
    if any(type(n) is not int for n in (q.shape[1], k.shape[1], q.shape[3])) or q.shape[1] % k.shape[1]:
        return "its numbers of heads or dimensions are not fixed"
    if not q.dtype == k.dtype == v.dtype:
        return "queries, keys and values differ in dtype"
    return None


def _raise(graph: Graph, sdpa: fx.Node) -> None:
    q, k, v = (sdpa_options(sdpa)[name] for name in NAMES[:3])
    k, v = _own_heads(k, v)
    single = [_heads_first("x").match(operand) for operand in (q, k, v)]
    outputs = [user for first in sdpa.users for user in first.users if TOKENS_FIRST.match(user)]
    if None not in single and outputs:  # one sequence, in tokens first: it stays so
        q, k, v = (found["x"] for found in single if found)
        new = _call(graph, sdpa, q, k, v)
        for user in outputs:
            graph.replace(user, new)
    else:
        q, k, v = (_tokens_first(graph, sdpa, operand) for operand in (q, k, v))
        new = _call(graph, sdpa, q, k, v)
        for user in list(sdpa.users):
            if any(found["x"] is sdpa for pattern in HEADS_FIRST if (found := pattern.match(user))):
                graph.replace(user, new)
    if sdpa.users:
        with graph.nodes.inserting_before(sdpa):
            batch = new if new.meta["val"].ndim == 4 else graph.call(aten.unsqueeze.default, new, 0, like=sdpa)
            graph.replace(sdpa, graph.call(aten.transpose.int, batch, 1, 2, like=sdpa))
    graph.take("raise_attention", new)


def _own_heads(k: Any, v: Any) -> tuple[Any, Any]:
    """Keys and values before each head was repeated for the queries that share it."""
    own = [found["x"] for x in (k, v) if (found := REPEATED_HEADS.match(x)) and _repeats_heads(x, found["x"])]
    return (own[0], own[1]) if len(own) == 2 and own[0].meta["val"].shape[1] == own[1].meta["val"].shape[1] else (k, v)


def _repeats_heads(x: fx.Node, own: fx.Node) -> bool:
    """Whether a 4-dimensional view of [B, heads, repeats, S, D] differs from [B, heads, S, D] in the heads alone."""
    repeated, before = x.meta["val"].shape, own.meta["val"].shape
    return len(before) == len(repeated) == 4 and [str(repeated[i]) for i in (0, 2, 3)] == [
        str(before[i]) for i in (0, 2, 3)
    ]


def _tokens_first(graph: Graph, sdpa: fx.Node, operand: Any) -> fx.Node:
    for pattern in HEADS_FIRST:
        if found := pattern.match(operand):
            return found["x"]  # type: ignore[no-any-return]
    with graph.nodes.inserting_before(sdpa):
        return graph.call(aten.transpose.int, operand, 1, 2, like=sdpa)


def _call(
    graph: Graph, node: fx.Node, q: Any, k: Any, v: Any, frames: Any = 1, video: Any = 0, window: Any = -1
) -> fx.Node:
    with graph.nodes.inserting_before(node):
        return graph.call(ATTENTION, q, k, v, None, 1, [], frames, video, window, like=node)


def _is_sdpa(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.scaled_dot_product_attention.default
