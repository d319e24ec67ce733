"""The immutable Plan: what is computed once at load, then the ordered calls of each run.

Calls stand for operators by name and for values by name, so that a plan can be read, compared and stored.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from horsepower.graph.contract import Contract, contract_of
from horsepower.graph.graph import Graph, Site
from horsepower.kernels.registry import op_of


@dataclass(frozen=True)
class Ref:
    """A value made before: an input, a weight or the result of a call."""

    name: str

    @classmethod
    def to(cls, node: fx.Node) -> Any:
        return cls(node.name)

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Call:
    """`result = target(*args)`; afterwards the values in `frees` are needed no more."""

    result: str
    target: str
    args: tuple[Any, ...]  # constants and Refs, in lists and tuples
    kwargs: tuple[tuple[str, Any], ...]
    frees: tuple[str, ...]
    module: str  # of the model, where the call comes from

    def __str__(self) -> str:
        operands = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs)]
        return f"%{self.result} = {self.target}({', '.join(operands)})"


@dataclass(frozen=True)
class Plan:
    """A compiled model without its weights."""

    contract: Contract
    inputs: tuple[str | None, ...]  # names of the flattened inputs; None for what was taken for a constant
    weights: tuple[tuple[str, str], ...]  # value and the parameter, buffer or constant that it is
    constants: Mapping[str, Tensor]
    loads: tuple[Call, ...]  # computed once, from weights alone
    calls: tuple[Call, ...]
    outputs: tuple[Any, ...]  # Refs and constants, flattened
    out_spec: pytree.TreeSpec
    sites: tuple[Site, ...]
    traced: int  # repeated blocks that were traced, the others being stamped out

    def __str__(self) -> str:
        """One line a call, under the module that it comes from."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"inputs  {', '.join(f'%{name}' for name in self.inputs if name)}"
        for title, calls in (("load", self.loads), ("run", self.calls)):
            yield title
            module = None
            for call in calls:
                if call.module != module:
                    module = call.module
                    yield f"  {module or '(model)'}"
                yield f"    {call}"
        yield f"outputs {', '.join(map(repr, self.outputs))}"


def name_of(target: Any) -> str:
    """An operator's name: aten.linear.default, operator.getitem."""
    return str(target) if isinstance(target, torch._ops.OpOverload) else f"operator.{target.__name__}"


def operator_of(name: str) -> Callable[..., Any]:
    """The inverse of `name_of`; an op of ours is called without a detour through torch. Raises ValueError."""
    if op := op_of(name):
        return op.single_result if op.single else op
    namespace, *path = name.split(".")
    found: Any = {"operator": operator}.get(namespace) or getattr(torch.ops, namespace)
    for step in path:
        found = getattr(found, step, None)
    if not callable(found):
        raise ValueError(f"plan: got the operator {name!r}, which this build does not know")
    return found  # type: ignore[no-any-return]


def plan_of(graph: Graph) -> Plan:
    """The plan of a graph as it stands: its order, and where each value is needed last."""
    calls = [node for node in graph.nodes.nodes if node.op == "call_function"]
    fixed = graph.fixed()
    output = next(node for node in graph.nodes.nodes if node.op == "output")
    last = {value: node for node in calls for value in node.all_input_nodes}
    kept = {*output.all_input_nodes, *fixed, *(node for node in graph.nodes.nodes if node.op != "call_function")}

    def call(node: fx.Node) -> Call:
        frees = () if node in fixed else tuple(v.name for v in (*node.all_input_nodes, node) if _ends(v, node))
        args, kwargs = fx.map_arg((node.args, node.kwargs), Ref.to)
        return Call(node.name, name_of(node.target), args, tuple(kwargs.items()), frees, node.meta["module"])

    def _ends(value: fx.Node, node: fx.Node) -> bool:
        return value not in kept and last.get(value, value) is node

    read = [node for node in graph.nodes.nodes if node.op == "get_attr"]
    outputs = fx.map_arg(output.args[0], Ref.to)
    return Plan(
        contract_of(graph),
        tuple(given.name if isinstance(given, fx.Node) else None for given in graph.inputs),
        tuple((node.name, str(node.target)) for node in read),
        {str(node.target): graph.constants[str(node.target)] for node in read if str(node.target) in graph.constants},
        tuple(call(node) for node in calls if node in fixed),
        tuple(call(node) for node in calls if node not in fixed),
        tuple(outputs),
        graph.out_spec,
        tuple(graph.sites),
        graph.traced,
    )
