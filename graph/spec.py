"""What a legal graph is: checked after each pass."""

import torch
from torch import fx

from horsepower.graph.graph import Graph, mutates

MODULES = ("_operator", "math", "torch")  # where the arithmetic of symbolic sizes lives


class SpecError(AssertionError):
    """A pass left a graph that breaks a rule: a fault of the compiler, not of the model."""


def check(graph: Graph, stage: str) -> None:
    """Every node is defined before it is used, knows its value and module, and changes nothing but its result.

    Raises SpecError naming the stage, the node and the rule.
    """
    seen: set[fx.Node] = set()
    for node in graph.nodes.nodes:
        for rule, broken in (
            ("inputs come before it", not seen.issuperset(node.all_input_nodes)),
            ("it has a value and a module", node.op != "output" and not {"val", "module"} <= node.meta.keys()),
            ("it calls an operator", node.op == "call_function" and not _is_operator(node)),
            ("it changes none of its inputs", mutates(node)),
        ):
            if broken:
                raise SpecError(f"after {stage}, {node.name} in {node.meta.get('module')!r}: not so that {rule}")
        seen.add(node)
    results = [node for node in graph.nodes.nodes if node.op == "output"]
    if len(results) != 1 or graph.nodes._root.prev is not results[0]:
        raise SpecError(f"after {stage}: one output at the end is needed")


def _is_operator(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) or getattr(node.target, "__module__", "") in MODULES
