"""Attention in eight bits, if the scheme says so: queries and keys become codes where they are made, values in a pass.

Each has one scale, from what bounds it: queries and keys the gain of their norm, values the weight that makes them of
normed rows. Proves: no code overflows, where tables of ropes are sines and cosines, as `rope` has them. Assumes that
the error is wanted, as `quantise` does.
"""

import operator
from typing import Any

import torch
from torch import fx

from horsepower.graph.graph import Graph, args_of, dtype_of
from horsepower.graph.passes.quantise import ATTENTION, operand
from horsepower.graph.passes.quantise_in_producer import QKV, values_of
from horsepower.kernels.attention import HEADS_OF_CODES
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.ops import ops
from horsepower.quant.scheme import Scheme

aten = torch.ops.aten


def quantise_attention(graph: Graph) -> None:
    if graph.scheme is None or not graph.scheme.attention:
        return
    for node in [each for each in graph.nodes.nodes if each.target is ATTENTION]:
        if reason := _refusal(graph.scheme, node):
            graph.refuse("quantise_attention", node, reason)
        else:
            graph.take("quantise_attention", _quantise(graph, node))


def _refusal(scheme: Scheme, node: fx.Node) -> str | None:
    """Why attention stays as it is, or None."""
    q, k, v = args_of(node)[:3]
    if pattern := scheme.keeps(str(node.meta["module"])):
        return f"kept: {pattern}"
    if node.meta["val"].ndim != 3:
        return "attention over a batch has no kernel of eight bits"
    if (D := node.meta["val"].shape[-1]) not in HEADS_OF_CODES:
        return f"heads of {D} have no kernel of eight bits"
    made = [args_of(x)[0] if x.target is operator.getitem else x for x in (q, k)]
    if made[0] is not made[1] or made[0].target is not QKV:
        return "queries and keys are not of one projection, normed and turned"
    items = [item for item in made[0].users if args_of(item)[1] < 2]
    if sorted(args_of(item)[1] for item in items) != [0, 1] or any({*item.users} != {node} for item in items):
        return "something else reads queries or keys"
    if dtype_of(args_of(made[0])[1]) != E4M3:
        return "its projection stays as it is"
    return None if values_of(v) else "its values are not known to be bounded"


def _quantise(graph: Graph, node: fx.Node) -> fx.Node:
    """The same attention of codes, in its place."""
    q_scale, k_scale = _heads_in_codes(graph, args_of(args_of(node)[0])[0])
    q, k, v, *others = args_of(node)
    others += [None] * (7 - len(others))  # `inverse`, if the result is no code
    values = values_of(v)
    assert values is not None

    def call(target: Any, *args: Any) -> fx.Node:
        return graph.call(target, *args, like=node)

    with graph.nodes.inserting_before(node):
        v_scale = call(ops.value_bound.default, *values)
        v = call(ops.transpose_to_codes.default, v, call(aten.reciprocal.default, v_scale))
        scales = call(aten.cat.default, [call(aten.mul.Tensor, q_scale, k_scale), v_scale])
        new = call(ATTENTION, q, k, v, *others, scales)
    graph.supplant(node, new)
    return new


def _heads_in_codes(graph: Graph, projection: fx.Node) -> list[fx.Node]:
    """Let a projection give queries and keys as codes, by scales whose inverses go into the gains; those scales."""
    named = ("rope", "experts", "counts", "heads_q", "heads_kv", "head_dim", "eps", "paired", "x_scale", "weight_scale")
    operands = [operand(projection, name) for name in named]
    scales, gains = [], []

    def call(target: Any, *args: Any) -> fx.Node:
        return graph.call(target, *args, like=projection)

    with graph.nodes.inserting_before(projection):
        for name in ("q_gain", "k_gain"):
            gain = operand(projection, name)
            scales.append(call(ops.head_bound.default, gain, operand(projection, "experts")))
            gains.append(call(aten.mul.Tensor, gain, call(aten.reciprocal.default, scales[-1])))
        new = call(QKV, *args_of(projection)[:2], *gains, *operands, E4M3)
        items = [call(operator.getitem, new, i) for i in range(3)]
    for item in list(projection.users):
        index = args_of(item)[1]
        (graph.replace if index == 2 else graph.supplant)(item, items[index])
    return scales
