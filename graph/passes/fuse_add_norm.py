"""A projection, its addition to the residual and the norm that follows, in this layer or the next, become one op.

Proves: the sum is the one that is normed. A norm of the branch before the addition (post-norm) goes with it; what it
was rounded to in between stays in float32.
"""

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from horsepower.graph.graph import Graph, args_of, dtype_of
from horsepower.graph.pattern import computed_by, is_cast, not_wider
from horsepower.kernels.ops import ops

aten = torch.ops.aten
FUSED = ops.linear_add_rms_norm.default


class Branch(NamedTuple):
    linear: fx.Node
    post_gain: fx.Node | None
    post_counts: list[fx.Node]
    post_eps: float | None


def fuse_add_norm(graph: Graph) -> None:
    for node in list(graph.nodes.nodes):
        if node.target is not ops.rms_norm.default or not _is_sum(total := node.args[0]):
            continue
        residual, branch = _sides(total)
        if branch is None:
            graph.refuse("fuse_add_norm", node, "neither side of the sum is a projection of its own")
            continue
        counts = [each for each in (args_of(node)[3], branch.linear.args[3], branch.post_counts) if each]
        if reason := _refusal(node, total, residual, branch, counts):
            graph.refuse("fuse_add_norm", node, reason)
            continue
        _, gain, _, _, eps, dtype = args_of(node)
        x, weight, experts, _ = branch.linear.args
        with graph.nodes.inserting_before(total):
            if dtype_of(residual) != dtype_of(total):
                residual = graph.call(aten.to.dtype, residual, dtype_of(total), like=node)
            fused = graph.call(
                FUSED, x, weight, experts, residual, branch.post_gain, gain, counts[0] if counts else [], eps, dtype,
                like=node,
            )  # fmt: skip
            new_sum, normed = (graph.call(operator.getitem, fused, i, like=node) for i in range(2))
        graph.replace(total, new_sum)
        graph.replace(node, normed)
        graph.take("fuse_add_norm", fused)


def _refusal(norm: fx.Node, total: fx.Node, residual: fx.Node, branch: Branch, counts: list[Any]) -> str | None:
    _, gain, _, _, eps, _ = args_of(norm)
    if gain is None:
        return "the norm has no gain"
    if branch.post_eps not in (None, eps):
        return "its two norms have different epsilons"
    if len({str(each.meta["val"].shape) for each in (residual, branch.linear, total)}) != 1:
        return "one side of the sum is broadcast"
    if any(each != counts[0] for each in counts):
        return "projection and norms split the rows differently"
    if not all(not_wider(dtype_of(each), dtype_of(total)) for each in (residual, branch.linear)):
        return f"the sum is kept in {dtype_of(total)}"
    if not computed_by((gain, counts), total):
        return "the gain or the counts are computed later than the sum"
    return None


def _is_sum(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs


def _sides(total: fx.Node) -> tuple[fx.Node, Branch | None]:
    """The residual and the branch of a sum, whichever way it is written."""
    one, other = total.args
    for residual, side in ((one, other), (other, one)):
        if isinstance(residual, fx.Node) and residual.meta["val"].ndim == 2 and (branch := _branch(side)):
            return residual, branch
    return one, None  # type: ignore[return-value]


def _branch(side: object) -> Branch | None:
    post: fx.Node | None = None
    while isinstance(side, fx.Node) and len(side.users) == 1:
        if side.target is ops.linear.default:
            if post is None:
                return Branch(side, None, [], None)
            _, gain, _, counts, eps, _ = post.args
            return Branch(side, gain, counts, eps)  # type: ignore[arg-type]
        if side.target is ops.rms_norm.default and post is None and side.args[1] is not None:
            post = side
        elif not is_cast(side):
            return None
        side = side.args[0]
    return None
