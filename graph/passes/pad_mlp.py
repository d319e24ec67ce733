"""On a GPU, the width between the projections of an MLP becomes a multiple of 128: whole tiles, rows aligned alike.

Proves: an activation of zeros is zero, and what it meets in the next weight is zero as well.
"""

from torch import fx

from horsepower.graph.graph import Graph, args_of
from horsepower.kernels.ops import ops

UP = ops.linear_activation.default
DOWN = (ops.linear.default, ops.linear_add_rms_norm.default)  # their first arguments: x, weight, experts
PAD = ops.pad_weight.default
WIDTH = 128


def pad_mlp(graph: Graph) -> None:
    if graph.target == "cpu":
        return
    for node in graph.nodes.nodes:
        if node.target is not UP or not (extra := -node.meta["val"].shape[-1] % WIDTH):
            continue
        if not all(_projects(user, node) for user in node.users):
            graph.refuse("pad_mlp", node, "something else than a projection reads it")
            continue
        x, weight, experts, counts, kind, dtype = args_of(node)
        rows = extra * (2 if kind == "swiglu7" else 1)
        with graph.nodes.inserting_before(node):
            padded = graph.call(PAD, weight, experts, rows, 0, like=weight)
            wide = graph.call(UP, x, padded, experts, counts, kind, dtype, like=node)
        graph.supplant(node, wide)
        for user in list(wide.users):
            _, weight, experts, *rest = args_of(user)
            with graph.nodes.inserting_before(user):
                padded = graph.call(PAD, weight, experts, 0, extra, like=weight)
            user.args = (wide, padded, experts, *rest)
        graph.take("pad_mlp", wide)


def _projects(user: fx.Node, x: fx.Node) -> bool:
    return user.target in DOWN and [i for i, given in enumerate(args_of(user)) if given is x] == [0]
