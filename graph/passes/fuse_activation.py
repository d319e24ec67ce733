"""Up-projection and activation become `linear_activation`. Proves: nobody else reads the wide intermediate."""

from torch import fx

from horsepower.graph.graph import Graph
from horsepower.kernels.ops import ops

FUSED = ops.linear_activation.default


def fuse_activation(graph: Graph) -> None:
    for node in graph.nodes.nodes:
        if node.target is not ops.activation.default:
            continue
        u, kind, dtype = node.args
        if not isinstance(u, fx.Node) or u.target is not ops.linear.default or len(u.users) != 1:
            graph.refuse("fuse_activation", node, "its input is not a projection of its own")
            continue
        with graph.nodes.inserting_before(node):
            new = graph.call(FUSED, *u.args, kind, dtype, like=node)
        graph.replace(node, new)
        graph.take("fuse_activation", new)
