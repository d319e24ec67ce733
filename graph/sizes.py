"""Sizes that are known when a plan is made or when it runs: integers, or expressions in the sizes of the inputs."""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

Size: TypeAlias = Any  # an int or a sympy expression
Sizes: TypeAlias = Mapping[str, int]  # what the symbols stand for, by name

_CALLS: dict[str, Callable[..., Any]] = {
    "FloorDiv": FloorDiv,
    "Mod": Mod,
    "Max": Max,
    "Min": Min,
    "Eq": sympy.Eq,
    "Ne": sympy.Ne,
}
_BINARY: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.FloorDiv: FloorDiv,
    ast.Mod: Mod,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def symbol(name: str) -> Size:
    """A size that an input brings along."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def size_of(size: int | torch.SymInt) -> Size:
    """The size of a fake tensor."""
    if isinstance(size, int):
        return size
    return simplified(size.node.expr)


def simplified(size: Size) -> Size:
    return int(size) if isinstance(size, sympy.Integer) else size


def evaluate(size: Size, sizes: Sizes) -> int:
    """Raises ValueError naming the symbols that are missing."""
    if isinstance(size, int):
        return size
    return int(_substituted(size, sizes))


def holds(condition: Size, sizes: Sizes) -> bool:
    """Whether a comparison of sizes is true. Raises ValueError naming the sizes that are missing."""
    return bool(_substituted(condition, sizes))


def _substituted(expression: Size, sizes: Sizes) -> Any:
    value = expression.subs({each: sizes[each.name] for each in expression.free_symbols if each.name in sizes})
    if value.free_symbols:
        raise ValueError(f"sizes: got no {', '.join(sorted(map(str, value.free_symbols)))}")
    return value


def renamed(size: Size, symbols: Mapping[Size, Size]) -> Size:
    """With other symbols. Raises ValueError for one that has no new name: a size that no input decides."""
    if isinstance(size, int):
        return size
    if unknown := size.free_symbols - symbols.keys():
        raise ValueError(f"size: got {size}, where {unknown.pop()} depends on the values of tensors")
    return simplified(size.xreplace(dict(symbols)))


def parse(text: str) -> Size:
    """The inverse of `str`, by arithmetic alone: nothing is executed. Raises ValueError for anything else."""
    try:
        return simplified(sympy.sympify(_parsed(ast.parse(text, mode="eval").body)))
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"size: got {text!r}, allowed: arithmetic of integers and symbols") from error


def _parsed(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return sympy.Integer(node.value)
    if isinstance(node, ast.Name):
        return symbol(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_parsed(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_parsed(node.left), _parsed(node.right))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _BINARY:
        return _BINARY[type(node.ops[0])](_parsed(node.left), _parsed(node.comparators[0]))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS and not node.keywords:
        return _CALLS[node.func.id](*map(_parsed, node.args))
    raise TypeError(ast.dump(node))


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data."""

    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: torch.Tensor, symbols: Mapping[Size, Size]) -> "TensorSpec":
        """Of a tensor or a fake one, with symbols renamed."""
        shape, strides = (tuple(renamed(size_of(n), symbols) for n in ns) for ns in (x.shape, x.stride()))
        return cls(shape, strides, x.dtype, x.device)

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.shape))}] {str(self.dtype).removeprefix('torch.')} on {self.device}"

    def at(self, value: Callable[[Size], int]) -> "TensorSpec":
        """With integers for sizes."""
        return TensorSpec(tuple(map(value, self.shape)), tuple(map(value, self.strides)), self.dtype, self.device)

    @property
    def bytes(self) -> int:
        """From the first element to the last; integers for sizes are needed."""
        if 0 in self.shape:
            return 0
        last: int = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def meta(self) -> torch.Tensor:
        """A tensor of this shape that has no memory; integers for sizes are needed."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")
