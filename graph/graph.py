"""The compiler's graph: one model as a flat list of operator calls that can be executed at every stage."""

import contextlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from horsepower.quant.scheme import Scheme


@dataclass(frozen=True)
class Site:
    """One place that a pass looked at: taken, or refused for a reason."""

    rewrite: str  # the pass
    module: str  # where in the model
    refused: str | None = None


@dataclass
class Graph:
    """An `fx.Graph` and what surrounds it.

    Placeholders are the tensors and integers of the flattened inputs; `get_attr` nodes are parameters and buffers by
    their names in the module. Every node carries its fake tensor (or symbolic integer) in `meta["val"]` and the path of
    its module in `meta["module"]`.
    """

    nodes: fx.Graph
    constants: Mapping[str, Tensor]  # tensors that the code made while it was traced, by get_attr name
    in_spec: pytree.TreeSpec  # of (args, kwargs)
    out_spec: pytree.TreeSpec
    inputs: tuple[fx.Node | object, ...]  # a flat input's placeholder, or the constant that it must equal
    traced: int  # repeated blocks that were traced, not stamped
    conditions: tuple[Any, ...] = ()  # what the trace assumed of sizes: true expressions in their symbols
    sites: list[Site] = field(default_factory=list)
    target: str = "cpu"  # what it is compiled for
    scheme: Scheme | None = None  # of eight bits

    def call(self, target: Callable[..., Any], *args: Any, like: fx.Node) -> fx.Node:
        """Append a call at the insertion point; its fake value comes from the operator's own shape rule."""
        node = self.nodes.call_function(target, args)
        node.meta = {"module": like.meta["module"], "val": on_fakes(target, *value_of(args))}
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let a value take another's place; `meta["origin"]` keeps the name that it had when it was captured."""
        new.meta["origin"] = old.meta.get("origin", old.name)
        old.replace_all_uses_with(new)

    def supplant(self, old: fx.Node, new: fx.Node) -> None:
        """Let a value take the place of one that it is not equal to, such as a padded one: it stands for none."""
        new.meta["origin"] = None
        old.replace_all_uses_with(new)

    def fixed(self) -> set[fx.Node]:
        """Calls that depend on weights alone, and are the same every time."""
        known: set[fx.Node] = set()
        for node in self.nodes.nodes:
            computed = node.op == "call_function" and known.issuperset(node.all_input_nodes) and not _is_random(node)
            if node.op == "get_attr" or computed:
                known.add(node)
        return {node for node in known if node.op == "call_function"}

    def sweep(self) -> None:
        """Drop what nobody uses; inputs stay."""
        for node in reversed(self.nodes.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.nodes.erase_node(node)

    def take(self, rewrite: str, node: fx.Node) -> None:
        self.sites.append(Site(rewrite, node.meta["module"]))

    def refuse(self, rewrite: str, node: fx.Node, reason: str) -> None:
        self.sites.append(Site(rewrite, node.meta["module"], reason))

    def taken(self, rewrite: str) -> int:
        """How many sites a pass took."""
        return sum(site.rewrite == rewrite and site.refused is None for site in self.sites)

    def run(self, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Execute the graph as it stands. `weights` holds every parameter and buffer by name."""
        flat = pytree.tree_flatten((args, kwargs))[0]
        env: dict[fx.Node, Any] = {
            node: given for node, given in zip(self.inputs, flat, strict=True) if isinstance(node, fx.Node)
        }
        output: Any = ()
        for node in self.nodes.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                env[node] = self.constants[name] if name in self.constants else weights[name]
            elif node.op == "call_function":
                assert callable(node.target)
                operands, options = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*operands, **options)
            elif node.op == "output":
                output = fx.map_arg(node.args[0], env.__getitem__)
        return pytree.tree_unflatten(list(output), self.out_spec)


def on_fakes(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What an operator returns for fake tensors. An error, rather than a dynamic size fixed to that of the trace."""
    mode = detect_fake_mode([x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if mode is not None:
            stack.enter_context(enable_python_dispatcher())
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.error_on_new_guards())
        return target(*args, **kwargs)


def is_view(node: fx.Node) -> bool:
    """Whether a call moves no data: its result shares its memory with an argument.

    The schema says it, but of an operator that is made of others, which does whatever these do.
    """
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if not torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd"):
        return any(result.alias_info is not None for result in target._schema.returns)
    known = node.meta.get("view")  # asked many times of each node, and found out by a call on fake tensors
    if known is None or known[0] is not node.args or known[1] is not node.kwargs:
        node.meta["view"] = known = (node.args, node.kwargs, _shares_memory(node))
    return bool(known[2])


def _shares_memory(node: fx.Node) -> bool:
    """Whether what a call returns for fake tensors lies where an argument lies."""
    args, kwargs = value_of(node.args), value_of(node.kwargs)
    given = {x.untyped_storage()._cdata for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    assert callable(node.target)
    made = [x for x in pytree.tree_leaves(on_fakes(node.target, *args, **kwargs)) if isinstance(x, Tensor)]
    return any(x.untyped_storage()._cdata in given for x in made)


def mutates(node: fx.Node) -> bool:
    """Whether an operator changes what it is given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_random(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags or "dropout" in str(target)
    )


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """Its arguments, for those who know what they are."""
    return node.args


def value_of(tree: Any) -> Any:
    """Arguments with each node replaced by its fake value."""
    return fx.map_arg(tree, lambda node: node.meta["val"])


def dtype_of(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
