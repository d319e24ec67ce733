"""What a model does modality by modality: split the rows, compute with each expert's weights, concatenate."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from horsepower.graph.graph import args_of

aten = torch.ops.aten


class Experts(NamedTuple):
    """The rows of `x`, `counts` at a time, went through calls that differ in their part of `stacked` alone."""

    x: fx.Node
    stacked: fx.Node
    counts: list[Any]
    first: fx.Node  # the call for the first modality


def match_experts(node: fx.Node, target: Callable[..., Any], weight: int) -> Experts | None:
    """Match cat([target(split(x)[i], ..., chunk(stacked)[i], ...) for i in range(3)]).

    `weight` is the position of the weight among the call's arguments; the others but the first must be equal.
    """
    if node.target is not aten.cat.default or (len(node.args) > 1 and node.args[1] != 0):
        return None
    calls = args_of(node)[0]
    if not isinstance(calls, list | tuple) or len(calls) != 3:
        return None
    if any(not isinstance(call, fx.Node) or call.target is not target or call.kwargs for call in calls):
        return None
    rows = {_item(call.args[0], i, aten.split_with_sizes.default) for i, call in enumerate(calls)}
    parts = {_item(call.args[weight], i, aten.chunk.default) for i, call in enumerate(calls)}
    others = {str([a for i, a in enumerate(call.args) if i not in (0, weight)]) for call in calls}
    if len(rows) != 1 or len(parts) != 1 or len(others) != 1 or None in rows or None in parts:
        return None
    (split,), (chunk,) = rows, parts
    assert split is not None
    assert chunk is not None
    rows_of, counts, *dim = args_of(split)
    stacked, *pieces = args_of(chunk)
    if dim not in ([], [0]) or pieces != [3] or rows_of.meta["val"].ndim < 2:
        return None
    return Experts(rows_of, stacked, list(counts), calls[0])


def _item(node: Any, index: int, target: Callable[..., Any]) -> fx.Node | None:
    """The call of `target` whose item `index` this node is."""
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == index:
        source = node.args[0]
        if isinstance(source, fx.Node) and source.target is target:
            return source
    return None
