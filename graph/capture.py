"""A module and example inputs in, one graph of the whole model out.

`torch.export` runs once over the model. In that run the first block of each kind is traced between two markers, and
every further one is a single opaque call; afterwards the marked region is stamped out in place of each call. So 40
layers cost as much as their kinds, and fusion still sees across their seams.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from horsepower.graph import repeats
from horsepower.graph.functionalise import BoundaryError, InPlaceError, functionalise, line_of
from horsepower.graph.graph import Graph, args_of


class CaptureError(ValueError):
    """The module cannot be one graph; the message names the source line and what to do."""


@dataclass(frozen=True)
class _Outputs:
    """What the first block of a kind returned."""

    spec: pytree.TreeSpec
    tensors: tuple[Tensor, ...]  # fake


@dataclass
class _Tracing:
    """The blocks of one capture; a region is named by the path of its first block."""

    regions: dict[Hashable, str] = field(default_factory=dict)
    outputs: dict[str, _Outputs] = field(default_factory=dict)


_tracing: ContextVar[_Tracing] = ContextVar("horsepower_tracing")

_MARKERS = torch.library.Library("horsepower_capture", "DEF")
_MARKERS.define("enter(Tensor[] inputs, str path) -> Tensor[]")
_MARKERS.define("leave(Tensor[] outputs, str path) -> Tensor[]")
_MARKERS.define("repeat(Tensor[] inputs, str path, str first) -> Tensor[]")


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty_strided(x.shape, x.stride()) for x in tensors]


torch.library.register_fake("horsepower_capture::enter", lambda inputs, path: _alike(inputs), lib=_MARKERS)
torch.library.register_fake("horsepower_capture::leave", lambda outputs, path: _alike(outputs), lib=_MARKERS)
torch.library.register_fake(
    "horsepower_capture::repeat",
    lambda inputs, path, first: _alike(_tracing.get().outputs[first].tensors),
    lib=_MARKERS,
)
_ENTER = torch.ops.horsepower_capture.enter.default
_LEAVE = torch.ops.horsepower_capture.leave.default
_REPEAT = torch.ops.horsepower_capture.repeat.default
_SETTINGS: dict[Any, int] = {  # operators that run a region of their own, and how many settings stand before it
    torch.ops.higher_order.wrap_with_autocast: 4,
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
}


def capture(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    method: str = "forward",
) -> Graph:
    """Trace `module.method(*args, **kwargs)` into one graph; neither weights nor inputs need real memory.

    dynamic_shapes: as for `torch.export.export`; sizes that it leaves out are fixed. Example sizes of dynamic
    dimensions should be distinct and at least 2, else `torch.export` takes them for constants.
    Raises CaptureError where the code breaks the graph.
    """
    blocks = repeats.find(module)
    try:
        try:
            graph = _traced(module, args, kwargs, dynamic_shapes, method, blocks)
        except BoundaryError:  # a block and what surrounds it change one tensor
            graph = _traced(module, args, kwargs, dynamic_shapes, method, {})
    except InPlaceError as error:
        raise CaptureError(str(error)) from None
    _stamp(graph.nodes)
    graph.sweep()
    return graph


def _traced(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any, method: str,
    blocks: Mapping[str, Hashable],
) -> Graph:  # fmt: skip
    """One trace of the module, with these blocks marked."""
    tracing = _Tracing()
    token = _tracing.set(tracing)
    try:
        with torch.no_grad():
            program = torch.export.export(
                _prepared(module, method, blocks), args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:  # the module's own code runs in there, and may raise anything
        raise CaptureError(_explained(module, error)) from error
    finally:
        _tracing.reset(token)
    _inline(program.graph_module)
    functionalise(program.graph, lambda node: node.target in (_ENTER, _LEAVE, _REPEAT))
    return _graph_of(program, len(tracing.outputs))


def _prepared(module: nn.Module, method: str, blocks: Mapping[str, Hashable]) -> nn.Module:
    """The module with its blocks marked. Copies share all tensors; the module given stays as it is."""
    copies = {"": _shallow(module)}

    def copied(path: str) -> nn.Module:
        if path not in copies:
            up, _, name = path.rpartition(".")
            parent = copied(up)
            copies[path] = _shallow(parent._modules[name])
            parent._modules[name] = copies[path]
        return copies[path]

    for path, kind in blocks.items():
        block = copied(path)
        block.__dict__["forward"] = _marked(block, kind, path)
    root = copies[""]
    if method != "forward":
        root.__dict__["forward"] = getattr(type(module), method).__get__(root)
    return root


def _shallow(module: nn.Module | None) -> nn.Module:
    assert module is not None
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _marked(block: nn.Module, kind: Hashable, path: str) -> Callable[..., Any]:
    """The block's forward: traced between markers the first time, one call every further time."""
    forward = type(block).forward.__get__(block)

    def run(*args: Any, **kwargs: Any) -> Any:
        tracing = _tracing.get()
        if not all(map(_is_fixed, (*args, *kwargs.values()))):
            return forward(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = _key(kind, spec, leaves)
        if key in tracing.regions:
            first = tracing.regions[key]
            return pytree.tree_unflatten(_REPEAT(tensors, path, first), tracing.outputs[first].spec)
        inside = iter(_ENTER(tensors, path))
        inner = [next(inside) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inner_args, inner_kwargs = pytree.tree_unflatten(inner, spec)
        results, out_spec = pytree.tree_flatten(forward(*inner_args, **inner_kwargs))
        if not all(isinstance(result, Tensor) for result in results):
            return forward(*args, **kwargs)  # traced where it stands; the marked region is swept
        outputs = _LEAVE(results, path)
        # Tracing may have found that two sizes are one: later blocks are called with the simpler name.
        tracing.regions[key] = tracing.regions[_key(kind, spec, leaves)] = path
        tracing.outputs[path] = _Outputs(out_spec, tuple(outputs))
        return pytree.tree_unflatten(outputs, out_spec)

    return run


def _is_fixed(value: Any) -> bool:
    """Whether a block cannot change an argument: its Python code runs for the first block of a kind alone."""
    if type(value) is tuple or pytree.is_namedtuple_instance(value):
        return all(map(_is_fixed, value))
    return isinstance(value, Tensor | bool | int | float | str | None | torch.dtype | torch.SymInt)


def _key(kind: Hashable, spec: pytree.TreeSpec, leaves: Sequence[Any]) -> Hashable:
    """Calls with equal keys compute the same function of their tensors."""
    parts: list[Hashable] = [kind, str(spec)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            parts.append((tuple(map(str, leaf.shape)), tuple(map(str, leaf.stride())), leaf.dtype, leaf.device))
        else:
            parts.append((type(leaf), str(leaf)))
    return tuple(parts)


def _inline(module: fx.GraphModule) -> None:
    """Regions with a grad mode or autocast of their own become part of the graph; it has no gradients anyway."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_autocast and args_of(node)[2]:
            inner = module.get_submodule(str(args_of(node)[4].target))
            assert isinstance(inner, fx.GraphModule)
            first = next((each for each in inner.graph.nodes if each.meta.get("stack_trace")), node)
            raise CaptureError(
                f"autocast: got {args_of(node)[1]} ({line_of(first)}), allowed: casts that the module writes out"
            )
        settings = _SETTINGS.get(node.target)
        if settings is None:
            continue
        region, *operands = node.args[settings:]
        inner = module.get_submodule(str(region.target))
        assert isinstance(inner, fx.GraphModule)
        _inline(inner)
        copies = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(inner.graph, copies)
        _splice(node, results)
        if not region.users:
            module.graph.erase_node(region)


def _graph_of(program: torch.export.ExportedProgram, traced: int) -> Graph:
    """Parameters as get_attr nodes by name, inputs as placeholders, one module path a node."""
    nodes = program.graph
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise CaptureError(f"{', '.join(changed)}: changed by the module, allowed: a module that only returns results")
    given = iter(signature.user_inputs)
    inputs: list[fx.Node | object] = []
    placeholders = {node.name: node for node in nodes.nodes if node.op == "placeholder"}
    for name, node in placeholders.items():
        node.meta["module"] = ""
        if name in names:
            with nodes.inserting_before(node):
                weight = nodes.create_node("get_attr", names[name])
            weight.meta = {"val": node.meta["val"], "module": names[name].rpartition(".")[0]}
            node.replace_all_uses_with(weight)
            nodes.erase_node(node)
            continue
        spec = next(given)
        if isinstance(node.meta["val"], Tensor | torch.SymInt):
            inputs.append(node)
        else:
            inputs.append(spec if isinstance(spec, int | float | bool | None) else node.meta["val"])
            nodes.erase_node(node)
    for node in nodes.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta.setdefault("module", list(stack.values())[-1][0] if stack else "")
    constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    spec_in, spec_out = program.call_spec.in_spec, program.call_spec.out_spec
    assert spec_in is not None
    assert spec_out is not None
    return Graph(nodes, constants, spec_in, spec_out, tuple(inputs), traced, _conditions(program, nodes))


def _conditions(program: torch.export.ExportedProgram, nodes: fx.Graph) -> tuple[Any, ...]:
    """What the trace assumed of sizes, but for the 2 that it takes for the least of any."""
    mode = detect_fake_mode([node.meta["val"] for node in nodes.nodes if isinstance(node.meta.get("val"), Tensor)])
    if mode is None or mode.shape_env is None:
        return ()
    guards = [mode.shape_env.replace(guard.expr) for guard in mode.shape_env.guards]
    for symbol, values in program.range_constraints.items():
        if symbol.is_Symbol and values.lower > 2:
            guards.append(symbol >= values.lower)
        if symbol.is_Symbol and values.upper != int_oo:
            guards.append(symbol <= values.upper)
    return tuple(dict.fromkeys(guard for guard in guards if guard != sympy.true))


def _stamp(nodes: fx.Graph) -> None:
    """Replace every opaque call by a copy of its kind's region with its own parameters, and drop the markers."""
    weights = {str(node.target): node for node in nodes.nodes if node.op == "get_attr"}
    regions = dict(_regions(nodes))
    for node in list(nodes.nodes):
        if node.target is _REPEAT:
            operands, path, first = args_of(node)
            with nodes.inserting_before(node):
                results = _copy(nodes, regions[first], operands, weights, first, path)
            _splice(node, results)
    for region in regions.values():
        _splice(region.leave, args_of(region.leave)[0])
        _splice(region.enter, args_of(region.enter)[0])


class _Region(NamedTuple):
    enter: fx.Node
    body: list[fx.Node]
    leave: fx.Node


def _copy(
    nodes: fx.Graph, region: _Region, operands: Sequence[fx.Node], weights: Mapping[str, fx.Node], first: str, path: str
) -> list[fx.Node]:
    """The region of block `first` once more, on other operands and with the parameters of block `path`."""
    copies: dict[fx.Node, fx.Node] = {}
    for inner in region.body:
        if inner.args and inner.args[0] is region.enter:
            copies[inner] = operands[args_of(inner)[1]]

    def own(inner: fx.Node) -> fx.Node:
        if inner.op == "get_attr" and str(inner.target).startswith(f"{first}."):
            return weights[path + str(inner.target)[len(first) :]]
        return copies.get(inner, inner)

    for inner in region.body:
        if inner not in copies:
            copies[inner] = nodes.node_copy(inner, own)
            copies[inner].meta = {**inner.meta, "module": path + inner.meta["module"][len(first) :]}
    return [own(result) for result in args_of(region.leave)[0]]


def _regions(nodes: fx.Graph) -> Iterator[tuple[str, _Region]]:
    """First block's path -> its marker, the nodes up to the closing marker, that marker. Regions do not nest."""
    enter: fx.Node | None = None
    body: list[fx.Node] = []
    for node in nodes.nodes:
        if node.target is _ENTER:
            enter, body = node, []
        elif node.target is _LEAVE:
            assert enter is not None
            yield str(node.args[1]), _Region(enter, body, node)
            body = []
        else:
            body.append(node)


def _splice(marker: fx.Node, values: Any) -> None:
    """Let the results of a marker be these values, and drop it."""
    for item in list(marker.users):
        item.replace_all_uses_with(values[args_of(item)[1]])
        item.graph.erase_node(item)
    marker.graph.erase_node(marker)


def _explained(module: nn.Module, error: Exception) -> str:
    """The first line of torch's message, and the last source line outside torch that it came from."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if "/torch/" not in filename and filename != __file__:
            place = f"{filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"module: {type(module).__name__} cannot be captured as one graph: {first} (at {place}); allowed: no branches "
        "on the values of tensors, no side effects; wrap what cannot be traced in a torch.library.custom_op"
    )
