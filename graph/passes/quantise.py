"""What the scheme says of each linear layer: its weight becomes codes and scales, and so may the rows that it reads.

Assumes that the error which comes with it is wanted: the one pass that is not exact.
"""

import operator
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import fx

from horsepower.graph.graph import Graph, args_of, dtype_of
from horsepower.kernels.float8 import LARGEST
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import op_of
from horsepower.kernels.tables import arguments
from horsepower.quant.scheme import Scheme

aten = torch.ops.aten
# Operators that begin with a product; their last two operands, the scales, are not there before this pass.
LINEARS = (
    ops.linear.default,
    ops.linear_activation.default,
    ops.linear_qk_norm_rope.default,
    ops.linear_add_rms_norm.default,
)
QUANTISE, ATTENTION = ops.quantise.default, ops.attention.default
PAD = ops.pad_weight.default
RECIPES = (PAD, ops.pair_heads.default)
COLUMNS = 16  # of which rows of codes must be a multiple on a GPU

Pair: TypeAlias = tuple[fx.Node, fx.Node]  # codes and scales


def quantise(graph: Graph) -> None:
    scheme = graph.scheme
    if scheme is None:
        return
    _check_keep(graph, scheme)
    known: dict[tuple[fx.Node, *tuple[Any, ...]], Pair] = {}

    def pair(x: fx.Node, *how: Any) -> Pair:
        """Codes and scales of a value, quantised once for all that read it; how: a weight's experts, for one scale."""
        if (x, *how) not in known:
            with graph.nodes.inserting_after(x):
                made = graph.call(ops.quantise_tensor.default if how else QUANTISE, x, *how, like=x)
            with graph.nodes.inserting_after(made):
                scales = graph.call(operator.getitem, made, 1, like=x)
                known[x, *how] = graph.call(operator.getitem, made, 0, like=x), scales
        return known[x, *how]

    for node in list(graph.nodes.nodes):
        if node.target not in (*LINEARS, aten.linear.default):
            continue
        if reason := refusal(graph, scheme, node):
            graph.refuse("quantise", node, reason)
            continue
        x, weight, *rest = args_of(node)
        recipes = _recipes(weight)
        parameter = _parameter(weight)
        codes, scales = pair(parameter, *([operand(node, "experts")] if scheme.weights == "tensor" else []))
        for recipe in reversed(recipes):
            codes, scales = _moved(graph, recipe, codes, scales, node)
        x_scale = None
        if scheme.inputs == "token":
            x, x_scale = pair(x)
        elif scheme.inputs == "tensor":
            x, scales = _calibrated(graph, x, scales, scheme, layer_of(parameter), node)
        node.args = (x, codes, *rest, x_scale, scales)
        graph.take("quantise", node)


def _check_keep(graph: Graph, scheme: Scheme) -> None:
    """Raises ValueError for a pattern that keeps nothing: a slip would otherwise quantise what was to be kept."""
    products = (node for node in graph.nodes.nodes if node.target in (*LINEARS, aten.linear.default))
    layers = [layer_of(_parameter(args_of(node)[1])) for node in products]
    layers += [str(node.meta["module"]) for node in graph.nodes.nodes if node.target is ATTENTION]
    for pattern in scheme.keep:
        if not any(replace(scheme, keep=(pattern,)).keeps(layer) for layer in layers):
            raise ValueError(f"keep: got {pattern!r}, allowed: patterns of layers, such as {layers[:2]}")


def refusal(graph: Graph, scheme: Scheme, node: fx.Node) -> str | None:
    """Why a product stays as it is, or None."""
    x, weight, *rest = args_of(node)
    if node.target is aten.linear.default and rest not in ([], [None]):
        return "it has a bias"
    parameter, dtype, columns = _parameter(weight), dtype_of(weight), weight.meta["val"].shape[-1]
    if parameter.op != "get_attr":
        return "its weight is computed from others"
    if dtype.itemsize != 2 or (scheme.inputs and dtype != torch.bfloat16):
        return f"its weight is {dtype}"
    if pattern := scheme.keeps(layer_of(parameter)):
        return f"kept: {pattern}"
    if scheme.inputs == "tensor" and layer_of(parameter) not in dict(scheme.largest):
        return "its input was not calibrated"
    if x.meta["val"].ndim != 2 and (scheme.inputs or graph.target != "cpu"):
        return f"its input has {x.meta['val'].ndim} dimensions"
    if graph.target != "cpu" and columns % COLUMNS:
        return f"its {columns} columns are no multiple of {COLUMNS}"
    return "it was not raised" if node.target is aten.linear.default else None


def operand(node: fx.Node, name: str) -> Any:
    """An operand of one of our operators by its name; None for one that is left out."""
    op = op_of(str(node.target))
    assert op is not None
    given = dict(zip(arguments(op.schema), args_of(node), strict=False))
    return given.get(name)


def layer_of(parameter: fx.Node) -> str:
    """The path of the layer that a weight belongs to."""
    return str(parameter.target).removesuffix(".weight")


def _calibrated(
    graph: Graph, x: fx.Node, scales: fx.Node, scheme: Scheme, layer: str, place: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """Codes of x by the scale that its layer was calibrated to, and the weight's scales with that one in them."""
    inverse = LARGEST / dict(scheme.largest)[layer]
    with graph.nodes.inserting_before(place):
        codes = graph.call(ops.to_codes.default, x, inverse, like=x)
        return codes, graph.call(aten.mul.Tensor, scales, 1 / inverse, like=place)


def _parameter(weight: fx.Node) -> fx.Node:
    """What a weight is before its recipes."""
    recipes = _recipes(weight)
    return args_of(recipes[-1])[0] if recipes else weight


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
        if graph.scheme is not None and graph.scheme.weights == "tensor":
            return codes, scales
        if recipe.target is PAD:
            how[-1] = 0  # scales have no columns to pad
        return codes, graph.call(recipe.target, scales, *how, like=recipe)  # type: ignore[arg-type]
