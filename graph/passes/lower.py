"""Each fused op becomes its parts, a library matrix product and an epilogue of ours, unless a kernel computes it whole.

On the CPU none does. On a GPU one may refuse, or be measured or predicted to be slower: that is decided at thousands of
tokens, since a plan holds for all lengths. A product over a batch that nothing was fused with is torch's again.
"""

import operator
from collections import deque
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import fx

from horsepower.graph.graph import Graph, args_of
from horsepower.graph.sizes import Size, evaluate, size_of
from horsepower.kernels.choice import TOKENS, Choice, choose
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import Op, op_of
from horsepower.kernels.tables import Site

aten = torch.ops.aten
LINEAR = ops.linear.default


def lower(graph: Graph) -> None:
    refusal = _refusals(graph)
    work = deque(graph.nodes.nodes)
    while work:
        node = work.popleft()
        if node.target is LINEAR and len(node.args) == 4 and args_of(node)[2] == 1 and node.meta["val"].ndim != 2:
            node.target, node.args = aten.linear.default, node.args[:2]  # which takes a batch as it is
            continue
        op = op_of(str(node.target))
        if op is None or op.expand is None:
            continue
        if graph.target != "cpu":
            reason = refusal(op, node)
            if reason is None:
                continue
            graph.refuse("lower", node, f"{op.name}: {reason}")

        def call(target, *args, like: fx.Node = node) -> fx.Node:  # type: ignore[no-untyped-def]
            work.appendleft(part := graph.call(target, *args, like=like))  # which may have parts of its own
            return part

        with graph.nodes.inserting_before(node):
            parts = op.expand(call, *node.args)
        if op.single:
            graph.replace(node, parts[0])
        else:
            for item in list(node.users):
                assert item.target is operator.getitem
                graph.replace(item, parts[args_of(item)[1]])


def _refusals(graph: Graph) -> Callable[[Op, fx.Node], str | None]:
    """Says why no kernel is to compute a call whole, or None. Equal sites are decided once."""
    hints = _hints(graph)
    known: dict[tuple[str, Site], Choice | None] = {}

    @cache
    def sized(size: Size, factor: int) -> int:
        return evaluate(size, {name: factor * hint for name, hint in hints.items()})

    def refusal(op: Op, node: fx.Node) -> str | None:
        traced = sized(size_of(args_of(node)[0].meta["val"].shape[0]), 1)
        inputs = _inputs(node, lambda size: sized(size, max(1, -(-TOKENS // max(traced, 1)))))
        reasons = [kernel.supports(*inputs) for kernel in op.kernels if "cuda" in kernel.devices]
        if None not in reasons:
            return ", ".join(map(str, reasons)) or "there is no kernel for it"
        site = op.name, Site.of(op, inputs)
        if site not in known:
            known[site] = choose(op, inputs, graph.target)
        choice = known[site]
        return str(choice) if choice is not None and choice.parts else None

    return refusal


def _hints(graph: Graph) -> Mapping[str, int]:
    """The sizes that inputs brought when they were traced, by the names of their symbols."""
    values = [given.meta["val"] for given in graph.inputs if isinstance(given, fx.Node)]
    sizes = [size for x in values for size in (x.shape if isinstance(x, torch.Tensor) else (x,))]
    symbolic = [(size_of(size), int(size.node.hint)) for size in sizes if isinstance(size, torch.SymInt)]
    return {expression.name: hint for expression, hint in symbolic if expression.is_Symbol}


def _inputs(node: fx.Node, sized: Callable[[Size], int]) -> Any:
    """Arguments of a call at other sizes than those of the trace, without data."""

    def concrete(value: fx.Node) -> Any:
        made = value.meta["val"]
        if not isinstance(made, torch.Tensor):
            return sized(size_of(made))
        shape, strides = (tuple(sized(size_of(n)) for n in sizes) for sizes in (made.shape, made.stride()))
        return torch.empty_strided(shape, strides, dtype=made.dtype, device="meta")

    return fx.map_arg(args_of(node), concrete)
