"""The immutable Plan: what is computed once at load, then the ordered calls of each run, and where results lie.

Calls stand for operators by name and for values by name, so that a plan can be read, compared and stored.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from horsepower.graph.call import Call, Ref, Result, Weight, refs_in
from horsepower.graph.contract import Contract, Rule, TensorRule, contract_of, symbols_of
from horsepower.graph.graph import Graph, Site, is_view
from horsepower.graph.loading import Load, bytes_held, loading
from horsepower.graph.memory import Layout, lay_out
from horsepower.graph.operators import name_of
from horsepower.graph.sizes import Size, TensorSpec


@dataclass(frozen=True)
class Plan:
    """A compiled model without its weights."""

    contract: Contract
    inputs: tuple[str | None, ...]  # names of the flattened inputs; None for what was taken for a constant
    weights: tuple[Weight, ...]
    constants: Mapping[str, Tensor]
    loads: tuple[Call, ...]  # computed once, from weights alone
    calls: tuple[Call, ...]
    outputs: tuple[Any, ...]  # Refs and constants, flattened
    out_spec: pytree.TreeSpec
    sites: tuple[Site, ...]
    traced: int  # repeated blocks that were traced, the others being stamped out
    target: str  # what it was made for

    def at(self, sizes: Mapping[str, int]) -> Layout:
        """Where results lie for sizes by their names in the contract, such as `video_0`.

        Raises ValueError naming the sizes that are missing.
        """
        return lay_out(self.calls, self.outputs, self._specs, sizes, self.device, self.target)

    @cached_property
    def device(self) -> torch.device:
        """Where most results lie, and so the arena."""
        devices = [spec.device for call in self.calls for spec in call.makes]
        return max(devices, key=devices.count, default=torch.device("cpu"))

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:
        """Of every value that is one tensor."""
        made = {call.result: call.spec for call in (*self.loads, *self.calls) if isinstance(call.spec, TensorSpec)}
        given = {rule.name: rule.spec for rule in self.contract.rules if isinstance(rule, TensorRule)}
        return {**{weight.value: weight.spec for weight in self.weights}, **given, **made}

    def on(self, device: torch.device) -> "Plan":
        """The same plan on another device: whatever lies on `self.device`. Raises ValueError for constants of meta."""
        here = self.device

        def moved(value: Any) -> Any:
            if isinstance(value, TensorSpec):
                return replace(value, device=device) if value.device == here else value
            if isinstance(value, list | tuple):
                return type(value)(map(moved, value))
            return device if isinstance(value, torch.device) and value == here else value

        def call(each: Call) -> Call:
            return replace(each, args=moved(each.args), kwargs=moved(each.kwargs), spec=moved(each.spec))

        def rule(each: Rule) -> Rule:
            return replace(each, spec=moved(each.spec)) if isinstance(each, TensorRule) else each

        if here.type == "meta" != device.type and (empty := [k for k, x in self.constants.items() if x.is_meta]):
            raise ValueError(f"{empty[0]}: got a constant without values, allowed: a module that is not on {here}")
        return replace(
            self,
            contract=replace(self.contract, rules=tuple(map(rule, self.contract.rules))),
            weights=tuple(replace(weight, spec=moved(weight.spec)) for weight in self.weights),
            constants={name: x.to(moved(x.device)) for name, x in self.constants.items()},
            loads=tuple(map(call, self.loads)),
            calls=tuple(map(call, self.calls)),
            outputs=moved(self.outputs),
        )

    @cached_property
    def loading(self) -> tuple[Load, ...]:
        """How weights become what the calls read."""
        kept = {name for call in self.calls for name in call.reads} | set(refs_in(self.outputs))
        return loading(self.weights, self.loads, kept)

    @property
    def weight_bytes(self) -> int:
        """Of the weights that the calls read, with those that are computed at load."""
        return bytes_held(self.loading)[1]

    @property
    def load_bytes(self) -> int:
        """The most that a load takes, if the weights come from elsewhere."""
        return bytes_held(self.loading)[0]

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


def plan_of(graph: Graph) -> Plan:
    """The plan of a graph as it stands: its order, and where each value is needed last.

    Raises ValueError for a result whose size depends on the values of tensors.
    """
    calls = [node for node in graph.nodes.nodes if node.op == "call_function"]
    fixed = graph.fixed()
    output = next(node for node in graph.nodes.nodes if node.op == "output")
    last = {value: node for node in calls for value in node.all_input_nodes}
    kept = {*output.all_input_nodes, *fixed, *(node for node in graph.nodes.nodes if node.op != "call_function")}
    symbols = symbols_of(graph)

    def call(node: fx.Node) -> Call:
        frees = () if node in fixed else tuple(v.name for v in (*node.all_input_nodes, node) if _ends(v, node))
        args, kwargs = fx.map_arg((node.args, node.kwargs), Ref.to)
        spec, views = _result(node, symbols), is_view(node)
        target = name_of(node.target)
        return Call(node.name, target, args, tuple(kwargs.items()), spec, views, frees, node.meta["module"])

    def _ends(value: fx.Node, node: fx.Node) -> bool:
        return value not in kept and last.get(value, value) is node

    read = [node for node in graph.nodes.nodes if node.op == "get_attr"]
    outputs = fx.map_arg(output.args[0], Ref.to)
    return Plan(
        contract_of(graph, symbols),
        tuple(given.name if isinstance(given, fx.Node) else None for given in graph.inputs),
        tuple(Weight(node.name, str(node.target), TensorSpec.of(node.meta["val"], symbols)) for node in read),
        {str(node.target): graph.constants[str(node.target)] for node in read if str(node.target) in graph.constants},
        tuple(call(node) for node in calls if node in fixed),
        tuple(call(node) for node in calls if node not in fixed),
        tuple(outputs),
        graph.out_spec,
        tuple(graph.sites),
        graph.traced,
        graph.target,
    )


def _result(node: fx.Node, symbols: Mapping[Size, Size]) -> Result:
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return TensorSpec.of(value, symbols)
    if isinstance(value, list | tuple) and all(isinstance(part, Tensor) for part in value):
        return tuple(TensorSpec.of(part, symbols) for part in value)
    return None
