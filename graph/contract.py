"""What a plan asks of its inputs: structure, dtypes, devices, ranks, and sizes that belong together."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from horsepower.graph.graph import Graph
from horsepower.graph.sizes import Size, TensorSpec, evaluate, holds, renamed, size_of, symbol


@dataclass(frozen=True)
class TensorRule:
    """An input tensor; a size that is a symbol is bound by the first input that has it."""

    name: str
    spec: TensorSpec  # strides are free


@dataclass(frozen=True)
class IntegerRule:
    """An input integer."""

    name: str
    value: Size


@dataclass(frozen=True)
class ConstantRule:
    """An input that the trace took for a constant."""

    name: str
    value: object


Rule: TypeAlias = TensorRule | IntegerRule | ConstantRule


@dataclass(frozen=True)
class Contract:
    """The rules of the flattened inputs, in order."""

    spec: pytree.TreeSpec
    rules: tuple[Rule, ...]
    conditions: tuple[Size, ...] = ()  # comparisons of sizes that the trace took for granted

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, int]]:
        """The flattened inputs, and what each symbol stands for. Raises ValueError naming the first bad input."""
        names = self.spec.children()[1].context  # keywords may come in any order
        if kwargs.keys() == set(names):
            kwargs = {name: kwargs[name] for name in names}
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec:
            raise ValueError(f"inputs: got {_outline(spec)}, allowed: {_outline(self.spec)}, as compiled")
        bound: dict[str, int] = {}
        derived: list[tuple[str, Size, int]] = []
        for rule, given in zip(self.rules, flat, strict=True):
            for size, value in _sizes(rule, given):
                if isinstance(size, int) or not size.is_Symbol:
                    derived.append((rule.name, size, value))
                elif bound.setdefault(size.name, value) != value:
                    raise ValueError(
                        f"{rule.name}: got a size of {value}, allowed: {bound[size.name]}, as the inputs before it"
                    )
        known = tuple(bound.items())
        for name, size, value in derived:
            expected = size if isinstance(size, int) else _evaluated(size, known)
            if expected != value:
                raise ValueError(f"{name}: got a size of {value}, allowed: {expected}")
        for condition in self.conditions:
            if not _holds(condition, known):
                sizes = ", ".join(f"{name} = {value}" for name, value in known if name in str(condition))
                raise ValueError(f"inputs: got {sizes}, allowed: {condition}, as the module took another way with them")
        return flat, bound


@lru_cache(4096)
def _evaluated(size: Size, bound: tuple[tuple[str, int], ...]) -> int:
    return evaluate(size, dict(bound))


@lru_cache(4096)
def _holds(condition: Size, bound: tuple[tuple[str, int], ...]) -> bool:
    return holds(condition, dict(bound))


def _sizes(rule: Rule, given: Any) -> list[tuple[Size, int]]:
    """Each size that the rule speaks of with the one given."""
    if isinstance(rule, ConstantRule):
        if type(given) is not type(rule.value) or repr(given) != repr(rule.value):  # -0.0 is not 0.0, nan is nan
            raise ValueError(f"{rule.name}: got {given!r}, allowed: {rule.value!r}, as compiled")
        return []
    if isinstance(rule, IntegerRule):
        if type(given) is not int:
            raise ValueError(f"{rule.name}: got {given!r}, allowed: an integer")
        return [(rule.value, given)]
    if not isinstance(given, Tensor):
        raise ValueError(f"{rule.name}: got {type(given).__name__}, allowed: a tensor {rule.spec}")
    spec = rule.spec
    if given.dtype != spec.dtype or given.device != spec.device or given.ndim != len(spec.shape):
        raise ValueError(f"{rule.name}: got {list(given.shape)} {given.dtype} on {given.device}, allowed: {spec}")
    return list(zip(spec.shape, given.shape, strict=True))


def symbols_of(graph: Graph) -> Mapping[Size, Size]:
    """The symbols of a trace under the names of the inputs that bring them: `video_0` rows of `video`."""
    found: dict[Size, Size] = {}
    for given in graph.inputs:
        if isinstance(given, fx.Node):
            value = given.meta["val"]
            sizes = value.shape if isinstance(value, Tensor) else (value,)
            names = [f"{given.name}_{i}" for i in range(len(sizes))] if isinstance(value, Tensor) else [given.name]
            for name, size in zip(names, map(size_of, sizes), strict=True):
                if not isinstance(size, int) and size.is_Symbol:
                    found.setdefault(size, symbol(name))
    return found


def contract_of(graph: Graph, symbols: Mapping[Size, Size]) -> Contract:
    """The contract of a captured graph."""
    rules: list[Rule] = []
    for i, given in enumerate(graph.inputs):
        if not isinstance(given, fx.Node):
            rules.append(ConstantRule(f"input {i}", given))
        elif isinstance(value := given.meta["val"], Tensor):
            rules.append(TensorRule(given.name, TensorSpec.of(value, symbols)))
        else:
            rules.append(IntegerRule(given.name, renamed(size_of(value), symbols)))
    known = [each for each in graph.conditions if each.free_symbols <= symbols.keys()]  # the others follow from rules
    conditions = tuple(each.xreplace(dict(symbols)) for each in known)
    return Contract(graph.in_spec, tuple(rules), tuple(each for each in conditions if each != sympy.true))


def _outline(spec: pytree.TreeSpec) -> str:
    """A structure of inputs in a few words."""
    args, kwargs = spec.children()
    values = [child.num_leaves for child in args.children()]
    return f"{len(values)} arguments of {values} values and keywords {list(kwargs.context)}"
