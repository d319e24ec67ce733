"""A mask of attention that is the same in every run is looked at: one that hides nothing goes, a causal one is said so.

Proves: the mask depends on no input and no weight, so it is computed here; it hides nothing, or all that is later.
"""

from typing import Any

import torch
from torch import Tensor, fx

from horsepower.graph.graph import Graph

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
LARGEST = 2**26  # elements of a mask that is worth computing here


def raise_mask(graph: Graph) -> None:
    known: dict[fx.Node, Tensor | None] = {}
    for node in graph.nodes.nodes:
        if node.target is not SDPA:
            continue
        options = sdpa_options(node)
        mask = options["attn_mask"]
        if not isinstance(mask, fx.Node):
            continue
        if mask not in known:
            known[mask] = _visible(graph, mask)
        visible = known[mask]
        if visible is None:
            graph.refuse("raise_mask", node, "the mask depends on what the model is given, or adds to the scores")
            continue
        hides = not bool(visible.all())
        tokens = [str(options[name].meta["val"].shape[-2]) for name in NAMES[:2]]  # type: ignore[attr-defined]
        whole = list(map(str, visible.shape[-2:])) == tokens  # a row that all queries share is not causal
        if hides and not (whole and bool((visible == torch.ones_like(visible).tril()).all())):
            graph.refuse("raise_mask", node, "the mask is neither causal nor empty")
            continue
        options |= {"attn_mask": None, "is_causal": hides}
        node.args = tuple(options.pop(name) for name in NAMES)
        node.kwargs = options
        graph.take("raise_mask", node)


def sdpa_options(node: fx.Node) -> dict[str, object]:
    """Every argument of an attention by its name, with the defaults of those that may stand without a name."""
    given = dict(zip(NAMES, node.args, strict=False))
    return {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, **given, **node.kwargs}


def _visible(graph: Graph, mask: fx.Node) -> Tensor | None:
    """Where a mask lets see, [..., queries, keys]; None if that is not the same in every run."""
    numel = mask.meta["val"].numel()
    needed = _ancestors(graph, mask)
    if needed is None or type(numel) is not int or numel > LARGEST:
        return None
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in needed:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = graph.constants[str(node.target)] if node.op == "get_attr" else node.target(*args, **kwargs)  # type: ignore[operator]
    value = values[mask]
    if value.device.type == "meta":
        return None
    if value.dtype == torch.bool:
        return value  # type: ignore[no-any-return]
    return value == 0 if bool(((value == 0) | (value == -torch.inf)).all()) else None


def _ancestors(graph: Graph, node: fx.Node) -> list[fx.Node] | None:
    """All that a value is computed from, in order; None if an input, a weight or chance is among it."""
    needed: set[fx.Node] = set()
    pending = [node]
    while pending:
        each = pending.pop()
        constant = each.op == "get_attr" and str(each.target) in graph.constants
        drawn = torch.Tag.nondeterministic_seeded in getattr(each.target, "tags", ())
        if drawn or not (constant or each.op == "call_function"):
            return None
        if each not in needed:
            needed.add(each)
            pending += each.all_input_nodes
    return sorted(needed)
