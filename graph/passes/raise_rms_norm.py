"""RMS norm over the last dimension, or one a modality, with the casts around it, becomes `rms_norm`.

As one operator, or written out: x * rsqrt(mean(x^2) + eps), then a gain. Proves: widening to float32 and norm are one;
a narrower result is rounded once, after the gain.
"""

import torch
from torch import fx

from horsepower.graph.graph import Graph, dtype_of
from horsepower.graph.modality import match_experts
from horsepower.graph.pattern import Call, Found, Hole, after_cast, before_widening, not_wider, one_row, widened
from horsepower.kernels.ops import ops

aten = torch.ops.aten
RMS_NORM = ops.rms_norm.default
SQUARES = Call(aten.mean.dim, Call(aten.pow.Tensor_Scalar, Hole("x"), 2), Hole("dims"), True)
SCALED = Call(
    aten.mul.Tensor, Hole("x"), Call(aten.rsqrt.default, Call(aten.add.Tensor, SQUARES, Hole("eps"))), commutes=True
)


def raise_rms_norm(graph: Graph) -> None:
    for node in graph.nodes.nodes:
        if experts := match_experts(node, aten.rms_norm.default, weight=2):
            x, gain, counts, call = experts
            _raise(graph, node, x, gain, 3, counts, call)
    graph.sweep()
    for node in graph.nodes.nodes:
        if node.target is aten.rms_norm.default:
            if len(node.args) != 4 or node.args[3] is None:
                graph.refuse("raise_rms_norm", node, "it has no epsilon")
                continue
            _raise(graph, node, node.args[0], node.args[2], 1, [], node)
        elif found := SCALED.match(node):
            _raise_written_out(graph, node, found)


def _raise_written_out(graph: Graph, node: fx.Node, found: Found) -> None:
    x, dims, eps = found["x"], found["dims"], found["eps"]
    if node.meta["val"].ndim == 0:
        graph.refuse("raise_rms_norm", node, "it is a single number")
        return
    if [dim % node.meta["val"].ndim for dim in dims] != [node.meta["val"].ndim - 1] or not isinstance(eps, float | int):
        graph.refuse("raise_rms_norm", node, "it norms more than the last dimension, or its epsilon is computed")
        return
    if dtype_of(node) not in (torch.float32, torch.float64):
        graph.refuse("raise_rms_norm", node, f"it is computed in {dtype_of(node)}")
        return
    last, gain = after_cast(node), None
    users = list(last.users)
    if len(users) == 1 and users[0].target is aten.mul.Tensor and not_wider(dtype_of(users[0]), dtype_of(node)):
        gain = next((own for own in users[0].args if own is not last and one_row(own, x)), None)
    if gain is not None:
        last = after_cast(users[0])
    with graph.nodes.inserting_before(last):
        new = graph.call(RMS_NORM, before_widening(x), widened(graph, gain), 1, [], eps, dtype_of(last), like=node)
    graph.replace(last, new)
    graph.take("raise_rms_norm", new)


def _raise(graph: Graph, node: fx.Node, x, gain, experts: int, counts, call: fx.Node) -> None:  # type: ignore[no-untyped-def]
    if len(call.args[1]) != 1:  # type: ignore[arg-type]
        graph.refuse("raise_rms_norm", node, "it norms more than the last dimension")
        return
    x, last = before_widening(x), after_cast(node)
    if torch.promote_types(dtype_of(x), torch.float32) not in (dtype_of(node), torch.float32):
        graph.refuse("raise_rms_norm", node, f"it is computed in {dtype_of(node)}")
        return
    with graph.nodes.inserting_before(last):
        new = graph.call(RMS_NORM, x, widened(graph, gain), experts, counts, call.args[3], dtype_of(last), like=call)
    graph.replace(last, new)
    graph.take("raise_rms_norm", new)
