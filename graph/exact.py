"""Captured calls in float64: the truth. Where attention over all rows would take too long, over some of its rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from horsepower.graph.passes.quantise import LINEARS
from horsepower.kernels.attention_ranges import key_ranges
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import Op, op_of

aten = torch.ops.aten
WINDOWED = "horsepower.windowed_attention.default"
LIMIT = 4e9  # floating-point operations of an attention in float64 that are done in full: a fraction of a second
ROWS = 128  # else
# What may follow an attention whose rows are sampled: calls that compute each row from the same row.
ROW_WISE = frozenset(
    ["transpose", "select", "unsqueeze", "to", "mul", "sigmoid", "flatten", "reshape", "contiguous", "clone"]
)


class Exact:
    """Calls operators in float64: tensors are widened, and casts to a narrower float are casts to float64.

    edges: rows that a sample must have on both sides. nodes: what is going to be called; with one attention among
    them, `index` says afterwards which rows of it were computed, the others being 0; None for all.
    """

    def __init__(self, nodes: Sequence[fx.Node] = (), edges: Sequence[int] = ()):
        self.index: Tensor | None = None
        self._edges, self._samples = edges, _may_sample(nodes)

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        if self._samples and (work := _attention(target, args, kwargs)):
            q, k, v, ranges = work
            pairs = sum((rows.stop - rows.start) * sum(p.stop - p.start for p in seen) for rows, seen in ranges)
            if 4 * pairs * q.shape[1] * q.shape[2] > LIMIT:
                return self._sampled(q, k, v, ranges, first=target is aten.scaled_dot_product_attention.default)
        return target(*args, **kwargs)

    def by_references(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a compiled graph: codes stay codes, and what they stand for is computed with in float64."""
        op = op_of(str(target))
        if op is None:
            return self(target, *args, **kwargs)
        args = pytree.tree_map(lambda value: value if value is E4M3 else _widened(value), args)
        return _result(op, self.by_references, args)

    def _sampled(self, q: Tensor, k: Tensor, v: Tensor, ranges: Sequence[Any], first: bool) -> Tensor:
        """q [L, Hq, D], k and v [L, Hkv, D] -> [L, Hq, D], or [1, Hq, L, D] if heads come first."""
        edges = [*self._edges, *(edge for rows, _ in ranges for edge in (rows.start, rows.stop))]
        drawn = torch.randperm(q.shape[0], generator=torch.Generator().manual_seed(0))[:ROWS]
        self.index = torch.tensor(sorted({*beside(edges, q.shape[0]), *drawn.tolist()}))
        out = torch.zeros_like(q)
        for rows, seen in ranges:
            mine = self.index[(self.index >= rows.start) & (self.index < rows.stop)]
            if len(mine):
                keys, values = (torch.cat([x[part] for part in seen]).transpose(0, 1)[None] for x in (k, v))
                some = F.scaled_dot_product_attention(q[mine].transpose(0, 1)[None], keys, values, enable_gqa=True)
                out[mine] = some[0].transpose(0, 1)
        return out.transpose(0, 1)[None] if first else out


def by_references(target: Any, *args: Any, **kwargs: Any) -> Any:
    """A call by plain operators: one of ours by its reference, and so whatever it is made of."""
    op = op_of(str(target))
    return target(*args, **kwargs) if op is None else _result(op, by_references, args)


def flushing(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but that products take denormal rows for zero, as bfloat16 products of CPUs do."""

    def flushed(target: Any, *args: Any, **kwargs: Any) -> Any:
        if target in LINEARS and args[0].dtype != E4M3:
            x, *rest = args
            args = (x.where(x.abs() >= torch.finfo(torch.bfloat16).tiny, 0), *rest)
        return call(target, *args, **kwargs)

    return flushed


def uncoded(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but that quantising leaves weights as they are, and products read no scales."""

    def plain(target: Any, *args: Any, **kwargs: Any) -> Any:
        if target is ops.quantise.default:
            return args[0], args[0].new_ones((args[0].shape[0], 1), dtype=torch.float32)
        if target in LINEARS and isinstance(args[-1], Tensor):  # the scales come last
            args = args[:-2]
        return call(target, *args, **kwargs)

    return plain


def _result(op: Op, call: Callable[..., Any], args: Sequence[Any]) -> Any:
    """As torch gives it."""
    made = op.reference(*args) if op.expand is None else op.expand(call, *args)
    return made[0] if op.single else made


def beside(edges: Sequence[int], rows: int) -> list[int]:
    """The rows on both sides of each edge, the first and the last one among them."""
    return sorted({row for edge in (0, rows, *edges) for row in (edge - 1, edge) if 0 <= row < rows})


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else torch.complex128 if value.is_complex else value
    if isinstance(value, Tensor) and value.is_complex():
        return value.to(torch.complex128)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """q, k, v of one sequence, tokens first, and which keys each range of rows sees; None for any other call."""
    if target is aten.scaled_dot_product_attention.default:
        if len(args) != 3 or set(kwargs) - {"enable_gqa"} or any(x.ndim != 4 or x.shape[0] != 1 for x in args):
            return None
        q, k, v = (x[0].transpose(0, 1) for x in args)
        return q, k, v, [(slice(0, q.shape[0]), (slice(0, k.shape[0]),))]
    if str(target) == WINDOWED:
        q, k, v, frames, video, window = args
        return q, k, v, key_ranges(frames, video, window, q.shape[0], k.shape[0])
    return None


def _may_sample(nodes: Sequence[fx.Node]) -> bool:
    """Whether one of the nodes is an attention and what follows it keeps rows apart."""
    heads = [n for n in nodes if n.target is aten.scaled_dot_product_attention.default or str(n.target) == WINDOWED]
    after = set(heads)
    for node in nodes:
        if node not in after and not after.isdisjoint(node.all_input_nodes):
            after.add(node)
            if str(node.target).split(".")[1:2] not in ([name] for name in ROW_WISE):
                return False
    return len(heads) == 1
