"""Each fused op that no single kernel computes becomes its parts: a library matrix product and an epilogue of ours.

On the CPU that is every one; on a GPU, where the fused kernel refuses. A product over a batch that nothing was fused
with is torch's again.
"""

import operator
from typing import Any

import torch
from torch import fx

from horsepower.graph.graph import Graph, args_of
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import op_of

aten = torch.ops.aten
LINEAR = ops.linear.default


def lower(graph: Graph) -> None:
    for node in list(graph.nodes.nodes):
        if node.target is LINEAR and args_of(node)[2] == 1 and node.meta["val"].ndim != 2:
            node.target, node.args = aten.linear.default, node.args[:2]  # which takes a batch as it is
            continue
        op = op_of(str(node.target))
        if op is None or op.expand is None:
            continue
        if graph.target != "cpu":
            reasons = [kernel.supports(*_example(node)) for kernel in op.kernels if "cuda" in kernel.devices]
            if None in reasons:
                continue
            graph.refuse("lower", node, f"{op.name}: {', '.join(map(str, reasons)) or 'there is no kernel for it'}")

        def call(target, *args, like: fx.Node = node) -> fx.Node:  # type: ignore[no-untyped-def]
            return graph.call(target, *args, like=like)

        with graph.nodes.inserting_before(node):
            parts = op.expand(call, *node.args)
        if op.single:
            graph.replace(node, parts[0])
        else:
            for item in list(node.users):
                assert item.target is operator.getitem
                graph.replace(item, parts[args_of(item)[1]])


def _example(node: fx.Node) -> Any:
    """Arguments of a call as they were when it was traced, without data."""

    def concrete(value: fx.Node) -> Any:
        made = value.meta["val"]
        if not isinstance(made, torch.Tensor):
            return _hint(made)
        shape, strides = (tuple(map(_hint, sizes)) for sizes in (made.shape, made.stride()))
        return torch.empty_strided(shape, strides, dtype=made.dtype, device="meta")

    return fx.map_arg(args_of(node), concrete)


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)
