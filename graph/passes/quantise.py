"""What the scheme says of each linear layer: its weight becomes codes and scales, and so may the rows that it reads.

Assumes that the error which comes with it is wanted: the one pass that is not exact.
"""

import operator
from typing import TypeAlias

import torch
from torch import fx

from horsepower.graph.graph import Graph, args_of, dtype_of
from horsepower.kernels.ops import ops
from horsepower.quant.scheme import Scheme

# Operators that begin with a product, (x, weight, experts, ...), by how many operands come before the scales.
LINEARS = {
    ops.linear.default: 4,
    ops.linear_activation.default: 6,
    ops.linear_qk_norm_rope.default: 12,
    ops.linear_add_rms_norm.default: 9,
}
QUANTISE = ops.quantise.default
PAD = ops.pad_weight.default
RECIPES = (PAD, ops.pair_heads.default)
COLUMNS = 16  # of which rows of codes must be a multiple on a GPU

Pair: TypeAlias = tuple[fx.Node, fx.Node]  # codes and scales


def quantise(graph: Graph) -> None:
    scheme = graph.scheme
    if scheme is None:
        return
    known: dict[fx.Node, Pair] = {}

    def pair(x: fx.Node) -> Pair:
        if x not in known:
            with graph.nodes.inserting_after(x):
                made = graph.call(QUANTISE, x, like=x)
            with graph.nodes.inserting_after(made):
                scales = graph.call(operator.getitem, made, 1, like=x)
                known[x] = graph.call(operator.getitem, made, 0, like=x), scales
        return known[x]

    for node in list(graph.nodes.nodes):
        if node.target not in LINEARS:
            continue
        x, weight, *rest = args_of(node)
        recipes = _recipes(weight)
        parameter = args_of(recipes[-1])[0] if recipes else weight
        if reason := _refusal(graph, scheme, x, weight, parameter):
            graph.refuse("quantise", node, reason)
            continue
        codes, scales = pair(parameter)
        for recipe in reversed(recipes):
            codes, scales = _moved(graph, recipe, codes, scales, node)
        x, x_scale = pair(x) if scheme.activations else (x, None)
        node.args = (x, codes, *rest, x_scale, scales)
        graph.take("quantise", node)


def _refusal(graph: Graph, scheme: Scheme, x: fx.Node, weight: fx.Node, parameter: fx.Node) -> str | None:
    dtype, columns = dtype_of(weight), weight.meta["val"].shape[1]
    if parameter.op != "get_attr":
        return "its weight is computed from others"
    if pattern := scheme.keeps(str(parameter.target).removesuffix(".weight")):
        return f"kept: {pattern}"
    if dtype.itemsize != 2 or (scheme.activations and dtype != torch.bfloat16):
        return f"its weight is {dtype}"
    if x.meta["val"].ndim != 2:
        return f"its input has {x.meta['val'].ndim} dimensions"
    if graph.target != "cpu" and columns % COLUMNS:
        return f"its {columns} columns are no multiple of {COLUMNS}"
    return None


def _recipes(weight: fx.Node) -> list[fx.Node]:
    """What is done with a parameter before it is read, the last first."""
    found = []
    while weight.target in RECIPES:
        found.append(weight)
        weight = args_of(weight)[0]
    return found


def _moved(graph: Graph, recipe: fx.Node, codes: fx.Node, scales: fx.Node, place: fx.Node) -> Pair:
    """Codes and scales as a recipe moves the rows that they belong to."""
    _, *how = args_of(recipe)
    with graph.nodes.inserting_before(place):
        codes = graph.call(recipe.target, codes, *how, like=recipe)  # type: ignore[arg-type]
        if recipe.target is PAD:
            how[-1] = 0  # scales have no columns to pad
        return codes, graph.call(recipe.target, scales, *how, like=recipe)  # type: ignore[arg-type]
