"""What a plan asks of its inputs: structure, dtypes, devices, ranks, and sizes that belong together."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from horsepower.graph.graph import Graph

Size: TypeAlias = Any  # an int or a sympy expression of symbols


@dataclass(frozen=True)
class TensorRule:
    """An input tensor; a size that is a symbol is bound by the first input that has it."""

    name: str
    dtype: torch.dtype
    device: torch.device
    shape: tuple[Size, ...]

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.shape))}] {str(self.dtype).removeprefix('torch.')} on {self.device}"


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


Rule = TensorRule | IntegerRule | ConstantRule


@dataclass(frozen=True)
class Contract:
    """The rules of the flattened inputs, in order."""

    spec: pytree.TreeSpec
    rules: tuple[Rule, ...]

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The flattened inputs. Raises ValueError naming the first that breaks its rule."""
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec:
            raise ValueError(f"inputs: got {_outline(spec)}, allowed: {_outline(self.spec)}, as compiled")
        bound: dict[Size, int] = {}
        derived: list[tuple[str, Size, int]] = []
        for rule, given in zip(self.rules, flat, strict=True):
            for size, value in _sizes(rule, given):
                if isinstance(size, int) or not size.is_Symbol:
                    derived.append((rule.name, size, value))
                elif bound.setdefault(size, value) != value:
                    raise ValueError(
                        f"{rule.name}: got a size of {value}, allowed: {bound[size]}, as the inputs before it"
                    )
        for name, size, value in derived:
            expected = size if isinstance(size, int) else int(size.xreplace(bound))
            if expected != value:
                raise ValueError(f"{name}: got a size of {value}, allowed: {expected}")
        return flat


def _sizes(rule: Rule, given: Any) -> list[tuple[Size, int]]:
    """Each size that the rule speaks of with the one given."""
    if isinstance(rule, ConstantRule):
        if type(given) is not type(rule.value) or given != rule.value:
            raise ValueError(f"{rule.name}: got {given!r}, allowed: {rule.value!r}, as compiled")
        return []
    if isinstance(rule, IntegerRule):
        if type(given) is not int:
            raise ValueError(f"{rule.name}: got {given!r}, allowed: an integer")
        return [(rule.value, given)]
    if not isinstance(given, Tensor):
        raise ValueError(f"{rule.name}: got {type(given).__name__}, allowed: a tensor {rule}")
    if given.dtype != rule.dtype or given.device != rule.device or given.ndim != len(rule.shape):
        raise ValueError(f"{rule.name}: got {list(given.shape)} {given.dtype} on {given.device}, allowed: {rule}")
    return list(zip(rule.shape, given.shape, strict=True))


def contract_of(graph: Graph) -> Contract:
    """The contract of a captured graph."""
    rules: list[Rule] = []
    for i, given in enumerate(graph.inputs):
        if not isinstance(given, fx.Node):
            rules.append(ConstantRule(f"input {i}", given))
        elif isinstance(value := given.meta["val"], Tensor):
            rules.append(TensorRule(given.name, value.dtype, value.device, tuple(map(_size, value.shape))))
        else:
            rules.append(IntegerRule(given.name, _size(value)))
    return Contract(graph.in_spec, tuple(rules))


def _size(size: int | torch.SymInt) -> Size:
    if isinstance(size, int):
        return size
    expression: Size = size.node.expr
    return int(expression) if isinstance(expression, sympy.Integer) else expression


def _outline(spec: pytree.TreeSpec) -> str:
    """A structure of inputs in a few words."""
    args, kwargs = spec.children()
    values = [child.num_leaves for child in args.children()]
    return f"{len(values)} arguments of {values} values and keywords {list(kwargs.context)}"
