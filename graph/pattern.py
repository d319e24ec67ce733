"""Patterns over graph nodes: nested calls with named holes.

MUL = Call(aten.mul.Tensor, Hole("x"), Call(aten.sigmoid.default, Hole("x")), commutes=True)
MUL.match(node)  ->  {"x": <the node>} or None
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from horsepower.graph.graph import Graph, args_of, dtype_of

Found = dict[str, Any]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Hole:
    """Anything, or any call of one operator; the same thing wherever in a pattern the name is the same."""

    name: str
    target: Callable[..., Any] | None = None

    def bind(self, value: Any, found: Found) -> Iterator[Found]:
        if self.target is not None and not (isinstance(value, fx.Node) and value.target is self.target):
            return
        if self.name not in found:
            yield {**found, self.name: value}
        elif found[self.name] is value or (not isinstance(value, fx.Node) and found[self.name] == value):
            yield found


class Call:
    """A call of one of some operators with these arguments; arguments beyond them must be absent."""

    def __init__(
        self, targets: Callable[..., Any] | tuple[Callable[..., Any], ...], *args: Any, commutes: bool = False
    ):
        self.targets = targets if isinstance(targets, tuple) else (targets,)
        self.args, self.commutes = args, commutes

    def match(self, node: Any) -> Found | None:
        """The first binding of the holes under which `node` is this call, or None."""
        return next(self.bind(node, {}), None)

    def bind(self, node: Any, found: Found) -> Iterator[Found]:
        if not isinstance(node, fx.Node) or node.target not in self.targets or node.kwargs:
            return
        orders = [self.args, self.args[::-1]] if self.commutes else [self.args]
        for args in orders:
            yield from _bind(args, node.args, found)


@dataclass(frozen=True)
class Cast:
    """A conversion of the pattern to another dtype, or the pattern itself."""

    inner: Any

    def bind(self, node: Any, found: Found) -> Iterator[Found]:
        if is_cast(node):
            yield from _bind_one(self.inner, node.args[0], found)
        yield from _bind_one(self.inner, node, found)


def is_cast(node: Any) -> bool:
    """Whether a node only changes the dtype, from one float to another of 16 bits or more: it rounds, and no more."""
    if not isinstance(node, fx.Node) or str(node.target) != "aten.to.dtype":
        return False
    return dtype_of(node) in FLOATS and dtype_of(args_of(node)[0]) in FLOATS


def before_widening(node: Any) -> Any:
    """What a cast to at least float32 widens; any other node itself. For ops that widen what they read."""
    if is_cast(node) and torch.promote_types(dtype_of(node.args[0]), torch.float32) == dtype_of(node):
        return node.args[0]
    return node


def not_wider(dtype: torch.dtype, than: torch.dtype) -> bool:
    """Whether the second dtype holds all values of the first."""
    return torch.promote_types(dtype, than) == than


def after_cast(node: fx.Node) -> fx.Node:
    """The cast that alone reads a node, else the node. For ops that cast what they return."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_cast(users[0]) else node


def one_row(node: Any, like: fx.Node) -> bool:
    """Whether a node is one vector along the last dimension of another."""
    return isinstance(node, fx.Node) and str(node.meta["val"].shape) == str(like.meta["val"].shape[-1:])


def widened(graph: Graph, weight: Any) -> Any:
    """A bfloat16 weight in float32, which is what the kernels read; cast once, at load. Any other as it is."""
    if not isinstance(weight, fx.Node) or dtype_of(weight) != torch.bfloat16:
        return weight
    with graph.nodes.inserting_after(weight):
        return graph.call(torch.ops.aten.to.dtype, weight, torch.float32, like=weight)


def computed_by(values: Any, place: fx.Node) -> bool:
    """Whether all nodes among some arguments stand before a place in the graph."""
    return all(value < place for value in pytree.tree_leaves(values) if isinstance(value, fx.Node))


def _bind(patterns: Any, values: Any, found: Found) -> Iterator[Found]:
    if len(patterns) != len(values):
        return
    if not patterns:
        yield found
        return
    for first in _bind_one(patterns[0], values[0], found):
        yield from _bind(patterns[1:], values[1:], first)


def _bind_one(pattern: Any, value: Any, found: Found) -> Iterator[Found]:
    if isinstance(pattern, Hole | Call | Cast):
        yield from pattern.bind(value, found)
    elif isinstance(pattern, list | tuple):
        if isinstance(value, list | tuple):
            yield from _bind(pattern, value, found)
    elif not isinstance(value, fx.Node) and pattern == value:
        yield found
