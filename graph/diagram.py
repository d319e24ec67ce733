"""A block's calls as boxes and edges, for a drawing: views are left out, weights are named inside the box."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from horsepower.graph.explain import block_of
from horsepower.graph.graph import Graph
from horsepower.graph.provenance import Region, is_size, moves_nothing, title


@dataclass(frozen=True)
class Box:
    title: str
    detail: str = ""  # weights that it reads
    group: int | None = None  # boxes of one group, before and after, do the same


@dataclass(frozen=True)
class Diagram:
    """Boxes, sources first; edges by their indices."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]


def diagram(graph: Graph, block: str, groups: Mapping[fx.Node, int]) -> Diagram:
    """The calls of `block` that compute, and where their inputs come from. groups: of some nodes."""
    fixed = graph.fixed()
    inside = {
        node
        for node in graph.nodes.nodes
        if _computes(node) and node not in fixed and block_of(str(node.meta["module"])) == block
    }
    boxes: dict[fx.Node, Box] = {}
    edges: dict[tuple[fx.Node, fx.Node], None] = {}
    for node in graph.nodes.nodes:
        if node in inside:
            weights = []
            for source in map(_source, node.all_input_nodes):
                if source.op == "get_attr" or source in fixed:
                    weights.append(_weight(source))
                elif not is_size(source):
                    boxes.setdefault(source, Box(f"from {_origin(source)}"))
                    edges[source, node] = None
            boxes[node] = Box(title(node), ", ".join(dict.fromkeys(weights)), groups.get(node))
    index = {node: i for i, node in enumerate(boxes)}
    return Diagram(tuple(boxes.values()), tuple((index[a], index[b]) for a, b in edges))


def groups_of(regions: list[Region]) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
    """A number for each region that makes one thing of several: by captured nodes, and by compiled ones."""
    before: dict[fx.Node, int] = {}
    after: dict[fx.Node, int] = {}
    for i, region in enumerate(regions):
        for node in region.replaced:
            before.setdefault(node, i)
        for node in region.fused:
            after[node] = i
    return before, after


def _computes(node: fx.Node) -> bool:
    return node.op == "call_function" and not moves_nothing(node)


def _source(node: fx.Node) -> fx.Node:
    """What a view, an item or a chain of them looks at."""
    while node.op == "call_function" and moves_nothing(node) and not is_size(node):
        node = next(x for x in node.all_input_nodes if not is_size(x))
    return node


def _weight(node: fx.Node) -> str:
    """linear_qkv.weight; of a value made from weights, the first of them."""
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return ".".join(str(node.target).split(".")[-2:])


def _origin(node: fx.Node) -> str:
    if node.op == "placeholder":
        return node.name
    shape = " x ".join(map(str, node.meta["val"].shape)) if isinstance(node.meta["val"], Tensor) else ""
    module = str(node.meta["module"])
    place = f" in {module}" if module and not shape else ""
    return f"{title(node)}{place}" if not module else f"{title(node)} of {module}"
