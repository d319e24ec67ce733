"""What each linear layer of a compiled graph is computed in: read off its calls, not off what was asked for.

So is attention, where a scheme has it in eight bits.
"""

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
    """One linear layer, or attention, which has no weight."""

    layer: str  # its path in the model, without the block: mlp.down_proj
    block: str  # block.layers.4, or ""
    call: str  # the operator that it is a part of
    weight: str
    input: str
    scales: str  # where those of the input come from
    quantiser: str  # the kernel that makes codes of the input
    kept: str  # why it is not quantised


def formats(graph: Graph) -> tuple[Format, ...]:
    """Of all products with a parameter, in the order of the graph; and of attention if the scheme speaks of it."""
    return tuple(_formats(graph))


def _formats(graph: Graph) -> Iterator[Format]:
    looked_at = [site for site in graph.sites if site.rewrite == "quantise_attention"]  # in the order of the graph
    for node in graph.nodes.nodes:
        if node.op == "call_function" and title(node) == "attention" and looked_at:
            yield _attention(node, looked_at.pop(0).refused or "")
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


def _attention(node: fx.Node, refused: str) -> Format:
    q, _, v = args_of(node)[:3]
    module = str(node.meta["module"])
    block = block_of(module)
    made = "" if refused else f"{_source(q)}, {_source(v)}"
    scales = "" if refused else "static"
    return Format(module[len(block) :].lstrip("."), block, title(node), "", _name(dtype_of(q)), scales, made, refused)


def _parameter(weight: fx.Node) -> str:
    while weight.op == "call_function" and weight.all_input_nodes:
        weight = weight.all_input_nodes[0]
    return str(weight.target)


def _input(node: fx.Node, x: fx.Node) -> tuple[str, str]:
    """Where the scales of codes come from, and what makes the codes."""
    scale = operand(node, "x_scale")
    return "static" if scale is None else "by token", _source(x)


def _source(x: fx.Node) -> str:
    """What makes a value."""
    while is_view(x):
        x = args_of(x)[0]
    return title(x)


def _name(dtype: torch.dtype) -> str:
    return "e4m3" if dtype == E4M3 else str(dtype).removeprefix("torch.")
