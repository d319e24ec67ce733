"""What each linear layer of a compiled graph is computed in: read off its calls, not off what was asked for."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from horsepower.graph.explain import block_of
from horsepower.graph.graph import Graph, args_of, dtype_of, is_view
from horsepower.graph.passes.quantise import operand, refusal
from horsepower.graph.provenance import title
from horsepower.kernels.float8 import E4M3


@dataclass(frozen=True)
class Format:
    """One linear layer."""

    layer: str  # its path in the model, without the block: mlp.down_proj
    block: str  # block.layers.4, or ""
    call: str  # the operator that it is a part of
    weight: str
    input: str
    scales: str  # where those of the input come from
    quantiser: str  # the kernel that makes codes of the input
    kept: str  # why it is not quantised


def formats(graph: Graph) -> tuple[Format, ...]:
    """Of all products with a parameter, in the order of the graph."""
    return tuple(_formats(graph))


def _formats(graph: Graph) -> Iterator[Format]:
    for node in graph.nodes.nodes:
        if node.op != "call_function" or not title(node).split(".")[-1].startswith("linear"):
            continue
        x, weight = args_of(node)[:2]
        layer = _parameter(weight).removesuffix(".weight")
        block = block_of(layer)
        scales = quantiser = kept = ""
        if dtype_of(weight) != E4M3:
            kept = "" if graph.scheme is None else refusal(graph, graph.scheme, node) or ""
        elif dtype_of(x) == E4M3:
            scales, quantiser = _input(node, x)
        names = (_name(dtype_of(weight)), _name(dtype_of(x)))
        yield Format(layer[len(block) :].lstrip("."), block, title(node), *names, scales, quantiser, kept)


def _parameter(weight: fx.Node) -> str:
    while weight.op == "call_function" and weight.all_input_nodes:
        weight = weight.all_input_nodes[0]
    return str(weight.target)


def _input(node: fx.Node, x: fx.Node) -> tuple[str, str]:
    """Where the scales of codes come from, and what makes the codes."""
    scale = operand(node, "x_scale")
    while is_view(x):
        x = args_of(x)[0]
    return "static" if scale is None else "by token", title(x)


def _name(dtype: torch.dtype) -> str:
    return "e4m3" if dtype == E4M3 else str(dtype).removeprefix("torch.")
