"""On a GPU, the dimensions of queries and keys that turn together come side by side, as their kernel wants them.

Proves: rows of the weight and gains move alike, and attention alone reads the results, whose products stay the same.
"""

import operator

from torch import fx

from horsepower.graph.graph import Graph, args_of
from horsepower.kernels.ops import ops

FUSED = ops.linear_qk_norm_rope.default
ATTENTION = ops.attention.default
PAIR = ops.pair_heads.default


def pair_rope(graph: Graph) -> None:
    if graph.target == "cpu":
        return
    for node in graph.nodes.nodes:
        if node.target is not FUSED or args_of(node)[-1]:
            continue
        if not _meet(node):
            graph.refuse("pair_rope", node, "queries and keys have other uses than one attention")
            continue
        x, weight, q_gain, k_gain, rope, experts, counts, heads_q, heads_kv, D, eps, _ = args_of(node)
        turned = rope.meta["val"].shape[1]
        with graph.nodes.inserting_before(node):
            weight = graph.call(PAIR, weight, experts, heads_q + heads_kv, D, turned, like=weight)
            q_gain, k_gain = (graph.call(PAIR, own, experts, 1, D, turned, like=own) for own in (q_gain, k_gain))
            operands = (x, weight, q_gain, k_gain, rope, experts, counts, heads_q, heads_kv, D, eps, True)
            new = graph.call(FUSED, *operands, like=node)
        for item in list(node.users):
            with graph.nodes.inserting_before(item):
                other = graph.call(operator.getitem, new, args_of(item)[1], like=item)
            (graph.supplant if args_of(item)[1] < 2 else graph.replace)(item, other)
        graph.take("pair_rope", new)


def _meet(node: fx.Node) -> bool:
    """Whether one attention reads the queries and the keys, each in its place, and nobody else does."""
    items = {item: args_of(item)[1] for item in node.users if item.target is operator.getitem}
    users = {user for item, i in items.items() if i < 2 for user in item.users}
    if [user.target for user in users] != [ATTENTION]:
        return False
    given = [items.get(value) if isinstance(value, fx.Node) else None for value in args_of(users.pop())]
    return given[:2] == [0, 1] and given.count(0) == given.count(1) == 1
