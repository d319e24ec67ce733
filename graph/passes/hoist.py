"""What depends on weights alone moves to the front, to be computed once at load. Proves: no input reaches it."""

from horsepower.graph.graph import Graph


def hoist(graph: Graph) -> None:
    weights = [node for node in graph.nodes.nodes if node.op == "get_attr"]
    fixed = graph.fixed()
    first = next(node for node in graph.nodes.nodes if node.op != "get_attr" and node not in fixed)
    for node in [*weights, *(node for node in graph.nodes.nodes if node in fixed)]:
        first.prepend(node)
