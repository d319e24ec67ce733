"""QKV projection, q/k norm, rotation and cast become `linear_qk_norm_rope`.

Proves: queries and keys are its first columns, head by head, normed and turned by the same table.
"""

import operator

import torch
from torch import fx

from horsepower.graph.graph import Graph, args_of, dtype_of, value_of
from horsepower.graph.pattern import Call, Hole, computed_by
from horsepower.kernels.ops import ops

aten = torch.ops.aten
FUSED = ops.linear_qk_norm_rope.default


def _columns(index: int) -> Call:
    return Call(operator.getitem, Call(aten.split_with_sizes.default, Hole("u"), Hole("widths"), -1), index)


def _turned(index: int) -> Call:
    heads = Call(aten.unflatten.int, _columns(index), -1, [-1, Hole("head_dim")])
    normed = Call(
        ops.rms_norm.default, heads, Hole(f"gain{index}"), Hole("experts"), Hole("counts"), Hole("eps"), Hole("wide")
    )
    return Call(ops.rope.default, normed, Hole("rope"), Hole("dtype"))


Q, K = _turned(0), _turned(1)


def fuse_qkv(graph: Graph) -> None:
    queries = {found["u"]: (node, found) for node in graph.nodes.nodes if (found := Q.match(node))}
    keys = {found["u"]: (node, found) for node in graph.nodes.nodes if (found := K.match(node))}
    for u, (q, found) in queries.items():
        if reason := _refusal(u, found, keys.get(u)):
            graph.refuse("fuse_qkv", q, reason)
            continue
        k, found_k = keys[u]
        D = found["head_dim"]
        heads_q, heads_kv = (width // D for width in found["widths"][:2])
        x, weight, linear_experts, counts = u.args
        split = next(user for user in u.users if user.target is aten.split_with_sizes.default)
        operands = (
            x, weight, found["gain0"], found_k["gain1"], found["rope"], linear_experts, counts, heads_q, heads_kv, D,
            found["eps"], False,
        )  # fmt: skip
        if not computed_by(operands, split):
            graph.refuse("fuse_qkv", q, "a gain or the table is computed later than the projection is split")
            continue
        with graph.nodes.inserting_before(split):
            fused = graph.call(FUSED, *operands, like=q)
            new_q, new_k, rest = (graph.call(operator.getitem, fused, i, like=q) for i in range(3))
            widths = found["widths"][2:]
            others = graph.call(aten.split_with_sizes.default, rest, widths, -1, like=q)
            parts = [graph.call(operator.getitem, others, i, like=q) for i in range(len(widths))]
        graph.replace(q, new_q)
        graph.replace(k, new_k)
        for item in list(split.users):
            if args_of(item)[1] >= 2:
                graph.replace(item, parts[args_of(item)[1] - 2])
        graph.take("fuse_qkv", fused)


def _refusal(u: fx.Node, q: dict, k: tuple[fx.Node, dict] | None) -> str | None:  # type: ignore[type-arg]
    if k is None:
        return "no keys beside the queries are normed and turned"
    if u.target is not ops.linear.default:
        return "the columns are not those of a projection without a bias"
    if q["gain0"] is None or k[1]["gain1"] is None:
        return "a norm has no gain"
    if any(q[name] != k[1][name] for name in ("rope", "experts", "counts", "eps", "dtype", "head_dim")):
        return "queries and keys differ in table, experts, epsilon or dtype"
    if q["experts"] != u.args[2] or q["dtype"] != dtype_of(u):
        return "projection and norms differ in experts or dtype"
    if len(q["widths"]) < 3:
        return "there are no values beside queries and keys"
    if u.meta["val"].ndim != 2 or sum(q["widths"]) != value_of(u).shape[1]:
        return "the projection is not [tokens, columns]"
    if len(u.users) != 1:
        return "the projection has further uses"
    return None
