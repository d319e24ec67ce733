"""Changes in place become new values: `x[0] = y` -> `x = select_scatter(x, y, 0, 0)`, for tensors that the code made.

Who shares memory with whom is what the trace itself saw. What is not understood is refused, never guessed.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from horsepower.graph.graph import args_of, mutates, on_fakes, value_of

aten = torch.ops.aten
Steps = list[tuple[Any, tuple[Any, ...]]]  # operators and their arguments after the first


def _same(view: fx.Node, base: fx.Node) -> Steps:
    return []


def _reshaped(view: fx.Node, base: fx.Node) -> Steps:
    return [(aten.reshape_as.default, (base,))]


def _transposed(view: fx.Node, base: fx.Node) -> Steps:
    return [(aten.transpose.int, view.args[1:])]


def _permuted(view: fx.Node, base: fx.Node) -> Steps:
    dims = [dim % len(args_of(view)[1]) for dim in args_of(view)[1]]
    return [(aten.permute.default, (sorted(range(len(dims)), key=dims.__getitem__),))]


# How the new value of a view becomes one of what it was taken from, by the view's operator.
INVERSES: dict[Any, Callable[[fx.Node, fx.Node], Steps]] = {
    **dict.fromkeys(
        (
            aten.alias.default, aten.detach.default, aten.contiguous.default, aten.to.dtype, aten.to.dtype_layout,
            aten.to.device, aten.type_as.default,
        ),
        _same,
    ),
    **dict.fromkeys(
        (
            aten.view.default, aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints,
            aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default,
        ),
        _reshaped,
    ),
    **dict.fromkeys((aten.t.default, aten.numpy_T.default), lambda view, base: [(view.target, ())]),
    aten.transpose.int: _transposed,
    aten.permute.default: _permuted,
}  # fmt: skip
SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
SPLITS: dict[Any, int] = {  # and the position of the dimension
    aten.chunk.default: 2,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.unbind.int: 1,
}


class InPlaceError(ValueError):
    """A change in place that cannot be said as a new value."""

    def __init__(self, node: fx.Node, reason: str):
        super().__init__(f"{node.target}: changes a tensor in place ({line_of(node)}): {reason}, allowed: a new tensor")


class BoundaryError(ValueError):
    """A change in place that reaches across the boundary of a repeated block."""


def functionalise(nodes: fx.Graph, is_boundary: Callable[[fx.Node], bool]) -> None:
    """Replace every operator that changes its first argument by the one that returns a new value.

    is_boundary: calls whose results share memory in ways that the trace does not see.
    Raises InPlaceError for a change of an input, a parameter or what is not understood, BoundaryError at a boundary.
    """
    if any(map(mutates, nodes.nodes)):
        _Rewriter(nodes, is_boundary).run()


class _Rewriter:
    def __init__(self, nodes: fx.Graph, is_boundary: Callable[[fx.Node], bool]):
        self.nodes, self.is_boundary = nodes, is_boundary
        self.index: dict[fx.Node, int] = {}
        self.same: dict[int | None, int | None] = {}  # a storage -> the one that it really is
        self.sharing: dict[int, list[fx.Node]] = {}  # storage -> the values in it, in order; the first is their root
        self.now: dict[fx.Node, fx.Node] = {}  # a value -> what it is after the changes so far

    def run(self) -> None:
        for node in list(self.nodes.nodes):
            if is_idle_dropout(node):  # eager returns the same tensor, which the trace does not see
                self.same[_storage(node)] = _storage(args_of(node)[0])
                node.replace_all_uses_with(args_of(node)[0])
                self.nodes.erase_node(node)
        self.index = {node: i for i, node in enumerate(self.nodes.nodes)}
        self.source = {node: args_of(node)[0] for node in self.index if node.args}  # before anything is replaced
        for node in self.index:
            if node.target is aten.detach_.default:  # changes nothing without gradients
                node.target = aten.detach.default
            storage = _storage(node)
            while storage in self.same:
                storage = self.same[storage]
            if storage is None:
                continue
            self.now[node] = node
            family = self.sharing.setdefault(storage, [])
            if node.target is aten.lift_fresh_copy.default:  # a copy, though the trace says otherwise
                family.clear()
            family.append(node)
            if mutates(node):
                self._rewrite(node, family)
                node.replace_all_uses_with(self.now[node])
                self.nodes.erase_node(node)

    def _rewrite(self, node: fx.Node, family: list[fx.Node]) -> None:
        target, root = self.source[node], family[0]
        self.now[node] = self.now.get(target, target)
        path = self._checked_path(node, family)
        with self.nodes.inserting_before(node):
            value = self._new_value(node, self.now[target], inside=bool(path))
            for view in path:
                value = self._into_source(node, view, value)
            then = dict(self.now)
            self.now[root] = value
            for each in family[1:]:
                source = self.now[self.source[each]]
                self.now[each] = source if mutates(each) else self._again(each, source)
        for each in family:
            then[each].replace_all_uses_with(
                self.now[each], delete_user_cb=lambda user: self.index.get(user, -1) > self.index[node]
            )

    def _checked_path(self, node: fx.Node, family: list[fx.Node]) -> list[fx.Node]:
        """The views from what is changed up to the root, all of them understood."""
        root = family[0]
        if not _understood(node):
            raise InPlaceError(node, "no operator returns it as a new value")
        if root.op != "call_function":
            raise InPlaceError(node, f"{root.target} is an input, a parameter or a buffer")
        for each in family:
            if self.is_boundary(each) or any(map(self.is_boundary, (*each.users, *each.all_input_nodes))):
                raise BoundaryError(str(InPlaceError(node, "it is seen on both sides of a block")))
            view = each
            while view is not root and view in family and (mutates(view) or self._is_known_view(view)):
                view = self.source[view]
            if view is not root:
                raise InPlaceError(node, f"{each.target} shares its memory")
        path, view = [], self.source[node]
        while view is not root:
            if view.target is aten.expand.default:
                raise InPlaceError(node, "it is an expanded view")
            if view.kwargs and INVERSES.get(view.target) is not _same and not mutates(view):
                raise InPlaceError(node, f"it is a view by {view.target} with {', '.join(view.kwargs)}")
            path.append(view)
            view = self.source[view]
        return path

    def _is_known_view(self, node: fx.Node) -> bool:
        known = (aten.expand.default, *INVERSES, *SCATTERS, *SPLITS)
        return node.target in known or (node.target is operator.getitem and self.source[node].target in SPLITS)

    def _new_value(self, node: fx.Node, target: fx.Node, inside: bool) -> fx.Node:
        """What the changed tensor is afterwards; inside a larger one its strides do not matter."""
        before = target.meta["val"]
        if node.target is aten.copy_.default:  # a name of its own: its source may change later
            new = self._call(aten.alias.default, (args_of(node)[1],), node)
        else:
            new = self._call(_twin(node.target), (target, *node.args[1:]), node, node.kwargs)
        if _alike(new.meta["val"], before, strides=not inside):
            return new
        return self._call(aten.copy.default, (target, new), node)

    def _into_source(self, node: fx.Node, view: fx.Node, value: fx.Node) -> fx.Node:
        """The new value of what `view` was taken from."""
        source = self.source[view]
        if mutates(view) or view.target in SPLITS:
            return value
        if source.target in SPLITS:
            return self._into_split(node, view, value)
        base = self.now[source]
        if scatter := SCATTERS.get(view.target):
            return self._call(scatter, (base, value, *view.args[1:]), node)
        for target, rest in INVERSES[view.target](view, base):
            value = self._call(target, (value, *rest), node)
        return value

    def _into_split(self, node: fx.Node, item: fx.Node, value: fx.Node) -> fx.Node:
        split, number = self.source[item], args_of(item)[1]
        base, place = self.now[self.source[split]], SPLITS[split.target]
        dim = args_of(split)[place] if len(split.args) > place else 0
        if split.target is aten.unbind.int:
            return self._call(aten.select_scatter.default, (base, value, dim, number), node)
        sizes = [part.shape[dim] for part in split.meta["val"][: number + 1]]
        if any(type(size) is not int for size in sizes):
            raise InPlaceError(node, "it is a part of an unknown size")
        return self._call(aten.slice_scatter.default, (base, value, dim, sum(sizes[:-1]), sum(sizes)), node)

    def _again(self, view: fx.Node, source: fx.Node) -> fx.Node:
        """A view once more, of what its source is now."""
        return self._call(view.target, (source, *view.args[1:]), view, view.kwargs)

    def _call(self, target: Any, args: tuple[Any, ...], like: fx.Node, kwargs: Any = None) -> fx.Node:
        node: fx.Node = self.nodes.call_function(target, args, dict(kwargs or {}))
        node.meta = {**like.meta, "val": on_fakes(target, *value_of(args), **value_of(dict(kwargs or {})))}
        return node


def line_of(node: fx.Node) -> str:
    """Where the model's code calls it: the last line outside torch."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
    places = [i for i, line in enumerate(lines) if line.startswith("File ") and "/torch/" not in line]
    return " ".join(lines[places[-1] : places[-1] + 2]) if places else "an unknown line"


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether a node is a dropout that drops nothing."""
    return node.target is aten.dropout.default and (args_of(node)[2] is False or args_of(node)[1] == 0)


def _understood(node: fx.Node) -> bool:
    """Whether an operator writes to its first argument alone, and has a twin without the underscore."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    schema = target._schema
    written = [x.alias_info is not None and x.alias_info.is_write for x in schema.arguments]
    return (
        schema.name.startswith("aten::")
        and schema.name.endswith("_")
        and written == [True] + [False] * (len(written) - 1)
        and not {torch.Tag.inplace_view, torch.Tag.nondeterministic_seeded} & set(target.tags)
        and _twin(target) is not None
    )


def _twin(target: Any) -> Any:
    schema = target._schema
    packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, schema.overload_name or "default", None)


def _storage(node: fx.Node) -> int | None:
    """Of a tensor, or of the first of several."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, list | tuple) and value else value
    return first.untyped_storage()._cdata if isinstance(first, Tensor) else None


def _alike(one: Tensor, other: Tensor, strides: bool) -> bool:
    """Whether two values agree in shape and dtype; as text, since to compare symbolic sizes would fix them."""
    pairs = [(one.shape, other.shape), (one.dtype, other.dtype)]
    if strides:
        pairs.append((one.stride(), other.stride()))
    return all(str(a) == str(b) for a, b in pairs)
