"""Rows are quantised by the kernel that produces them, in registers.

A norm does so by the row. What is bounded takes a static scale, which goes into that of the weight behind it: swiglu7
and gelu7 by their clamps, attention by the length of the normed rows that its values come from. Proves: no code
overflows.
"""

import operator
from typing import Any

import torch
from torch import fx

from horsepower.graph.graph import Graph, args_of, is_view
from horsepower.graph.passes.quantise import ATTENTION, LINEARS, QUANTISE, operand
from horsepower.kernels.activation import FP8_GAINS
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.ops import ops

aten = torch.ops.aten
QKV = ops.linear_qk_norm_rope.default
# Norms after an addition, and their twins that quantise.
SUMS = {
    ops.add_rms_norm.default: ops.add_rms_norm_quantise.default,
    ops.linear_add_rms_norm.default: ops.linear_add_rms_norm_quantise.default,
}
ACTIVATIONS = (ops.activation.default, ops.linear_activation.default)
# Which of a norm's results are normed rows: others are sums, which nothing bounds.
NORMED = {
    ops.rms_norm.default: 0, ops.rms_norm_quantise.default: 0, **dict.fromkeys((*SUMS, *SUMS.values()), 1)
}  # fmt: skip


def quantise_in_producer(graph: Graph) -> None:
    fixed = graph.fixed()
    for node in list(graph.nodes.nodes):
        if node.target is not QUANTISE or node in fixed:
            continue
        root, views = _source(args_of(node)[0])
        others = [user for value in (root, *views) for user in value.users if user is not node and user not in views]
        readers = [user for item in node.users for user in item.users]
        if any(user.target not in LINEARS or user.kwargs for user in readers):  # a model that quantises by itself
            reason: str | None = "something else than a product reads the codes or their scales"
        else:
            reason = f"{others[0].target} reads its input too" if others else _fuse(graph, node, root, views)
        if reason:
            graph.refuse("quantise_in_producer", node, reason)


def _source(x: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What x views, and the views in between, the first of them first."""
    views: list[fx.Node] = []
    while is_view(x) and x.target is not operator.getitem:
        views.insert(0, x)
        x = args_of(x)[0]
    return x, views


def _fuse(graph: Graph, node: fx.Node, root: fx.Node, views: list[fx.Node]) -> str | None:
    """Let what computes the input quantise it; or why not."""
    producer = args_of(root)[0] if root.target is operator.getitem else root
    args = args_of(producer)
    if producer.target in SUMS and args_of(root)[1] == 1 and not views:
        others = [value for value in args if not isinstance(value, torch.dtype)]
        with graph.nodes.inserting_before(producer):
            new = graph.call(SUMS[producer.target], *others, like=producer)
            total, codes, scales = (graph.call(operator.getitem, new, i, like=producer) for i in range(3))
        for item in list(producer.users):
            if args_of(item)[1] == 0:
                graph.replace(item, total)
        _by_rows(graph, node, codes, scales)
    elif producer.target is ops.rms_norm.default and not views:
        with graph.nodes.inserting_before(producer):
            new = graph.call(ops.rms_norm_quantise.default, *args[:5], like=producer)
            codes, scales = (graph.call(operator.getitem, new, i, like=producer) for i in range(2))
        _by_rows(graph, node, codes, scales)
    elif producer.target in ACTIVATIONS and operand(producer, "kind") in FP8_GAINS:
        others = [E4M3 if isinstance(value, torch.dtype) else value for value in args]
        with graph.nodes.inserting_before(producer):
            new = graph.call(producer.target, *others, like=producer)
        _statically(graph, node, new, views, 1 / FP8_GAINS[operand(producer, "kind")])
    elif producer.target is ATTENTION:
        if producer.meta["val"].ndim == 4:
            return "attention over a batch has no kernel that quantises"
        values = values_of(args[2])
        if values is None:
            return "what attention reads as values is not known to be bounded"
        with graph.nodes.inserting_before(producer):
            bound = graph.call(ops.value_bound.default, *values, like=producer)
            inverse = graph.call(aten.reciprocal.default, bound, like=producer)
            new = graph.call(ATTENTION, *args, inverse, like=producer)
        _statically(graph, node, new, views, bound)
    elif producer.target in NORMED:
        return "it reads a view of normed rows" if views else "it reads the sum, not what is normed of it"
    else:
        return f"{producer.target} has no kernel that quantises"
    graph.take("quantise_in_producer", new)
    return None


def _by_rows(graph: Graph, node: fx.Node, codes: fx.Node, scales: fx.Node) -> None:
    """Let codes and scales of rows stand where those of a `quantise` stood."""
    for item in list(node.users):
        graph.supplant(item, (codes, scales)[args_of(item)[1]])


def _statically(graph: Graph, node: fx.Node, new: fx.Node, views: list[fx.Node], scale: Any) -> None:
    """Let codes of one scale, as their views, stand where those of a `quantise` stood."""
    for view in views:
        with graph.nodes.inserting_before(node):
            new = graph.call(view.target, new, *args_of(view)[1:], like=view)  # type: ignore[arg-type]
    items = {args_of(item)[1]: item for item in node.users}
    for linear in list(items[1].users):
        *operands, _, weight_scale = args_of(linear)
        with graph.nodes.inserting_before(linear):
            linear.args = (*operands, None, graph.call(aten.mul.Tensor, weight_scale, scale, like=linear))
    graph.supplant(items[0], new)


def values_of(v: fx.Node) -> tuple[Any, ...] | None:
    """As `value_bound` takes them: weight, its scale, the norm's gain, experts, and which of its rows make v.

    None if v are not columns of a projection of normed rows.
    """
    x, _ = _source(v)
    first = 0
    width = v.meta["val"].shape[-2:].numel()
    if x.target is operator.getitem and args_of(x)[0].target is aten.split_with_sizes.default:
        (rest, sizes, *dim), index = args_of(args_of(x)[0]), args_of(x)[1]
        if dim != [-1] or sizes[index] != width:
            return None
        (x, slices), first = _source(rest), sum(sizes[:index])
        if any(args_of(view)[:3] != (x, 1, 0) for view in slices):
            return None
    if x.target is not operator.getitem or args_of(x)[0].target is not QKV or args_of(x)[1] != 2:
        return None
    linear = args_of(x)[0]
    rows, weight, experts, weight_scale = (operand(linear, name) for name in ("x", "weight", "experts", "weight_scale"))
    first += (operand(linear, "heads_q") + operand(linear, "heads_kv")) * operand(linear, "head_dim")
    if rows.target is operator.getitem and args_of(rows)[0].target is QUANTISE:
        rows = args_of(args_of(rows)[0])[0]
    elif rows.target is ops.to_codes.default:
        rows = args_of(rows)[0]
    norm, result = args_of(rows) if rows.target is operator.getitem else (rows, 0)
    if NORMED.get(norm.target) != result:
        return None
    return weight, weight_scale, operand(norm, "gain"), experts, first, width
