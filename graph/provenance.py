"""What each call of a compiled graph stands for: it is aligned with the captured graph value by value.

A value that a pass replaced keeps the captured name of what it replaced (`meta["origin"]`); a node that no pass touched
keeps its own. Between aligned values lie the regions: calls that were rewritten, and the captured calls that they
replace. A name is no proof: a region counts as unchanged only if operator and arguments are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from horsepower.graph import passes
from horsepower.graph.graph import Graph, is_view
from horsepower.graph.spec import SpecError

Name = str  # of a node of the captured graph


@dataclass(frozen=True)
class Region:
    """Calls of a compiled graph, and the captured ones that they replace: the same outputs from the same inputs."""

    fused: tuple[fx.Node, ...]  # of the compiled graph, in order
    replaced: tuple[fx.Node, ...]  # of the captured graph, in order; none if the value is an input of the region
    reads: dict[fx.Node, fx.Node]  # compiled value from outside -> captured value
    inputs: tuple[fx.Node, ...]  # captured values that either side reads
    outputs: tuple[tuple[fx.Node, fx.Node], ...]  # compiled value that others use, captured value

    @property
    def module(self) -> str:
        """The path of the module that its last kernel is attributed to."""
        kernels = [node for node in self.fused if not moves_nothing(node)]
        return str((kernels or self.fused)[-1].meta["module"])

    def rewrite(self, changed: Mapping[Name, Sequence[str]]) -> str:
        """The last pass that changed it, lowering apart, which changes every fused op alike."""
        named = [[name for name in changed.get(twin.name, ()) if name != "lower"] for _, twin in self.outputs]
        return max(named, key=len)[-1] if any(named) else "unknown"


def snapshot(graph: Graph) -> Graph:
    """A copy that passes over the original do not touch; nodes keep their names."""
    nodes = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes.nodes:
        copies[node] = nodes.node_copy(node, copies.__getitem__)
        assert copies[node].name == node.name or node.op == "output"
    inputs = tuple(copies[given] if isinstance(given, fx.Node) else given for given in graph.inputs)
    return replace(graph, nodes=nodes, inputs=inputs, sites=list(graph.sites))


def rewrite(graph: Graph, only: Sequence[passes.Pass]) -> dict[Name, list[str]]:
    """Run the passes in place; which of them changed how each captured value is computed, in order."""
    changed: dict[Name, list[str]] = {}
    texts: dict[fx.Node, tuple[Any, str]] = {}
    before = _producers(graph, texts)
    for each in only:
        passes.run(graph, (each,))
        after = _producers(graph, texts)
        for name, producer in after.items():
            if producer != before.get(name, producer):
                changed.setdefault(name, []).append(each.__name__)
        before |= after
    return changed


def _producers(graph: Graph, texts: dict[fx.Node, tuple[Any, str]]) -> dict[Name, str]:
    """Every value's name when it was captured, and how it is computed. texts: kept between calls for what stays."""
    found: dict[Name, str] = {}
    for node in graph.nodes.nodes:
        if node.op == "call_function":
            if node not in texts or texts[node][0] is not node.args:
                texts[node] = node.args, f"{node.target} {fx.map_arg((node.args, node.kwargs), _name)}"
            found[_name(node)] = texts[node][1]
    return found


def _name(node: fx.Node) -> Name:
    return str(node.meta.get("origin", node.name))


def regions(captured: Graph, compiled: Graph) -> list[Region]:
    """Every region of the compiled graph that differs from what was captured, in order.

    Raises SpecError if an output of the graph stands for no captured value: a pass that did not use `Graph.replace`.
    """
    names = {node.name: node for node in captured.nodes.nodes}
    aligned = {node: names[_name(node)] for node in compiled.nodes.nodes if _name(node) in names}
    for node in next(n for n in compiled.nodes.nodes if n.op == "output").all_input_nodes:
        if node not in aligned:
            raise SpecError(f"{node.name} in {node.meta['module']!r}: not so that outputs keep their captured names")
    return [
        _region(group, aligned)
        for group in _groups(compiled, aligned)
        if len(group) > 1 or not _same(group[0], aligned)
    ]


def _groups(compiled: Graph, aligned: dict[fx.Node, fx.Node]) -> list[list[fx.Node]]:
    """Calls on tensors; a value that stands for nothing captured belongs with all that read it."""
    calls = [node for node in compiled.nodes.nodes if node.op == "call_function" and not is_size(node)]
    leader: dict[fx.Node, fx.Node] = {node: node for node in calls}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in calls:
        if node not in aligned:
            for user in node.users:
                leader[find(user)] = find(node)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in calls:
        groups.setdefault(find(node), []).append(node)
    return list(groups.values())


def _same(node: fx.Node, aligned: dict[fx.Node, fx.Node]) -> bool:
    """Whether a call is the captured one still."""
    twin = aligned[node]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda value: aligned.get(value, value))
    return node.target is twin.target and args == twin.args and kwargs == twin.kwargs


def _region(group: list[fx.Node], aligned: dict[fx.Node, fx.Node]) -> Region:
    inside = set(group)
    reads = {value: aligned[value] for node in group for value in node.all_input_nodes if value not in inside}
    outputs = [node for node in group if node in aligned and not inside.issuperset(node.users)]
    alive = {twin for node, twin in aligned.items() if node not in inside}
    replaced, leaves = _slice([aligned[node] for node in outputs], set(reads.values()), alive)
    inputs = dict.fromkeys((*reads.values(), *leaves))
    return Region(tuple(group), tuple(replaced), reads, tuple(inputs), tuple((node, aligned[node]) for node in outputs))


def _slice(
    outputs: Iterable[fx.Node], inputs: set[fx.Node], alive: set[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The captured calls between inputs and outputs, and what else they read.

    What depends on no input is read where it is still alive on the compiled side: if a rewrite forgot an operand, the
    operand becomes an input that only the captured side reads.
    """
    found = _ancestors(outputs, lambda node: node in inputs)
    depends: set[fx.Node] = set()
    for node in sorted(found):
        if node in inputs or not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
    wanted = set(outputs)
    kept = _ancestors(outputs, lambda n: n in inputs or (n in alive and n not in depends and n not in wanted))
    calls = sorted(node for node in kept if _is_call(node) and node not in inputs)
    body = [node for node in calls if node in wanted or node in depends or node not in alive]
    members = set(body)
    return body, sorted(node for node in kept if node not in members)


def _ancestors(outputs: Iterable[fx.Node], stops: Any) -> set[fx.Node]:
    """The outputs and all that they come from, as far as the values where to stop, and these."""
    found: set[fx.Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if _is_call(node) and not stops(node):
                pending += node.all_input_nodes
    return found


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function" and not is_size(node)


def is_size(node: fx.Node) -> bool:
    """Whether the value is a number, not a tensor (or several)."""
    return isinstance(node.meta["val"], int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)


def layout(node: fx.Node) -> tuple[object, ...]:
    """Shapes, strides and dtypes of a value, to compare: sizes are integers or sympy expressions, quicker than text."""
    tensors = [x for x in pytree.tree_leaves(node.meta["val"]) if isinstance(x, torch.Tensor)]
    sizes = ([n if isinstance(n, int) else n.node.expr for n in (*x.shape, *x.stride())] for x in tensors)
    return tuple((tuple(each), x.dtype) for each, x in zip(sizes, tensors, strict=True))


def title(node: fx.Node) -> str:
    """An operator in short: attention, aten.mul."""
    return ".".join(str(node.target).removeprefix("horsepower.").split(".")[: 2 if "aten" in str(node.target) else 1])


def moves_nothing(node: fx.Node) -> bool:
    """Whether a call yields a number or a view."""
    return is_size(node) or is_view(node)
