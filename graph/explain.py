"""What a compiled graph does with a captured one, in numbers: pure, on tensors without memory.

A block is an element of a ModuleList or Sequential, equal blocks are one kind. Calls that only view are not counted.
Bytes: what a call reads and writes, once. FLOPs: of products and attention exactly; otherwise about one a value.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from horsepower.graph.graph import Graph, Site
from horsepower.graph.provenance import Name, is_size, layout, moves_nothing, regions, title
from horsepower.kernels.registry import OPS, Cost, op_of

aten = torch.ops.aten
MOVES = frozenset(["cat", "clone", "contiguous", "flatten", "reshape", "to", "stack", "index", "embedding", "pad"])
Block: TypeAlias = str  # path of a module


@dataclass(frozen=True)
class Work:
    """What some calls do in one run."""

    calls: int = 0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.calls + other.calls, self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Fusion:
    """One rewrite, in all blocks of a kind."""

    rewrite: str
    count: int
    replaced: tuple[tuple[str, int], ...]  # captured calls of one site, and how many of each
    kernels: tuple[str, ...]  # that run instead


@dataclass(frozen=True)
class Kind:
    """Equal blocks; "" stands for all that is in no block."""

    blocks: tuple[Block, ...]
    before: Work  # of all of them; a call over a seam belongs to the block whose norm it ends with
    after: Work
    fusions: tuple[Fusion, ...]

    @property
    def name(self) -> str:
        """block.layers 0-3, 36."""
        return blocks_of(self.blocks)


@dataclass(frozen=True)
class Refusal:
    rewrite: str
    reason: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    kinds: tuple[Kind, ...]
    refused: tuple[Refusal, ...]
    before: Work
    after: Work
    load: int  # calls that depend on weights alone: once, when the plan is loaded
    peak_before: int  # bytes of values alive at once, if each is freed after its last use; without weights and inputs
    peak_after: int


def measure(
    captured: Graph, compiled: Graph, changed: Mapping[Name, Sequence[str]], inputs: Sequence[Any]
) -> Explanation:
    """changed: the passes behind each value, from `provenance.rewrite`. inputs: the flattened inputs, on any device."""
    before, after = Measured.of(captured, inputs), Measured.of(compiled, inputs)
    fixed = compiled.fixed()
    run = {node: work for node, work in after.work.items() if node not in fixed}
    sites = [(region, region.rewrite(changed)) for region in regions(captured, compiled)]
    kinds = []
    for members in _kinds(captured):
        inside = set(members)
        found: Counter[tuple[str, tuple[tuple[str, int], ...], tuple[str, ...]]] = Counter()
        for region, rewrite in sites:
            kernels = tuple(title(node) for node in region.fused if node in run)
            if block_of(region.module) in inside and kernels:
                replaced = Counter(title(node) for node in region.replaced if node in before.work)
                if replaced != Counter(kernels):  # else the same calls, with fewer views or casts between them
                    found[rewrite, tuple(replaced.items()), kernels] += 1
        kinds.append(
            Kind(
                tuple(members),
                _total(work for node, work in before.work.items() if _block(node) in inside),
                _total(work for node, work in run.items() if _block(node) in inside),
                tuple(Fusion(rewrite, n, replaced, kernels) for (rewrite, replaced, kernels), n in found.items()),
            )
        )
    return Explanation(
        tuple(kinds),
        _refusals(compiled.sites),
        _total(before.work.values()),
        _total(run.values()),
        len(after.work) - len(run),
        before.peak,
        after.peak,
    )


def blocks_of(blocks: Sequence[Block]) -> str:
    """block.layers 0-3, 36; of blocks of one list."""
    if blocks[0] == "":
        return "around the blocks"
    return f"{blocks[0].rpartition('.')[0]} {_ranges([int(path.rpartition('.')[2]) for path in blocks])}"


def block_of(module: str) -> Block:
    """The outermost block that a module lies in: block.layers.4.mlp -> block.layers.4; "" for none."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", module)
    return found.group() if found else ""


def _block(node: fx.Node) -> Block:
    return block_of(str(node.meta["module"]))


def _kinds(captured: Graph) -> list[list[Block]]:
    """Blocks by what they compute, in the order of the first of each kind; what is in no block comes last."""
    calls: dict[Block, list[object]] = {}
    for node in captured.nodes.nodes:
        if node.op == "call_function" and not is_size(node):
            block = _block(node)
            constants = str(fx.map_arg(node.args, lambda _: "%"))
            path = str(node.meta["module"])[len(block) :]
            calls.setdefault(block, []).append((path, str(node.target), constants, layout(node)))
    kinds: dict[object, list[Block]] = {}
    for block, its in calls.items():
        if block:
            kinds.setdefault((block.rpartition(".")[0], tuple(its)), []).append(block)
    return [*kinds.values(), [""]]


def _refusals(sites: Sequence[Site]) -> tuple[Refusal, ...]:
    found: dict[tuple[str, str], list[str]] = {}
    for site in sites:
        if site.refused:
            found.setdefault((site.rewrite, site.refused), []).append(site.module)
    return tuple(Refusal(rewrite, reason, tuple(modules)) for (rewrite, reason), modules in found.items())


@dataclass
class Measured:
    """A graph run on tensors without memory."""

    work: dict[fx.Node, Work] = field(default_factory=dict)  # of each call that computes
    given: dict[fx.Node, tuple[Any, ...]] = field(default_factory=dict)  # arguments of each call of an op of ours
    sizes: dict[fx.Node, int] = field(default_factory=dict)  # bytes of each value, inputs and weights included
    peak: int = 0

    @classmethod
    def of(cls, graph: Graph, inputs: Sequence[Any]) -> "Measured":
        """inputs: the flattened inputs, on any device."""
        made = cls()
        alive = _Alive(graph)
        given = (x.to("meta") if isinstance(x, Tensor) else x for x in inputs)
        env: dict[fx.Node, Any] = {n: x for n, x in zip(graph.inputs, given, strict=True) if isinstance(n, fx.Node)}
        for node in graph.nodes.nodes:
            if node.op == "get_attr":
                x = node.meta["val"]
                env[node] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            elif node.op == "call_function":
                operands = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), operands)
                env[node] = node.target(*args, **kwargs)
                if op_of(str(node.target)):
                    made.given[node] = tuple(args)
                if not moves_nothing(node):
                    cost = cost_of(node.target, args, kwargs, env[node])
                    made.work[node] = Work(1, cost.flops, cost.bytes)
                made.peak = max(made.peak, alive.after(node, env))
        made.sizes = {node: _size(value) for node, value in env.items()}
        return made


class _Alive:
    """Bytes of memory in use while a graph runs; views share their source's."""

    def __init__(self, graph: Graph):
        self._fixed, self._last = graph.fixed(), dict[fx.Node, fx.Node]()
        for node in graph.nodes.nodes:
            self._last |= dict.fromkeys((node, *node.all_input_nodes), node)
        self._users: Counter[int] = Counter()  # values in each piece of memory
        self._bytes = 0

    def after(self, node: fx.Node, env: dict[fx.Node, Any]) -> int:
        """Bytes once this call has run, before what it reads last is freed."""
        if node in self._fixed:
            return 0
        for place, size in _places(env[node]):
            self._bytes += 0 if self._users[place] else size
            self._users[place] += 1
        now = self._bytes
        for value in {node, *node.all_input_nodes}:
            if self._last[value] is node and value.op == "call_function" and value not in self._fixed:
                for place, size in _places(env[value]):
                    self._users[place] -= 1
                    self._bytes -= 0 if self._users[place] else size
        return now


def _places(value: Any) -> list[tuple[int, int]]:
    """Each tensor's memory and its size."""
    tensors = (x for x in pytree.tree_leaves(value) if isinstance(x, Tensor))
    return [(x.untyped_storage()._cdata, x.untyped_storage().nbytes()) for x in tensors]


def _size(value: Any) -> int:
    """Bytes of all tensors in a value."""
    return sum(x.numel() * x.itemsize for x in pytree.tree_leaves(value) if isinstance(x, Tensor))


def cost_of(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Cost:
    """Of one call on tensors of known sizes."""
    if op := op_of(str(target)):
        return op.cost(*args)
    read = {id(x): x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    written = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    return Cost(_flops(target, args, kwargs, written), _size([*read.values(), *written]))


def _flops(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], written: Sequence[Tensor]) -> int:
    values = sum(x.numel() for x in written)
    if target is aten.linear.default:
        return int(2 * args[0].numel() * args[1].shape[0] + (values if len(args) > 2 else 0))
    if target is aten.matmul.default:
        return 2 * values * int(args[0].shape[-1])
    if target is aten.scaled_dot_product_attention.default:
        return int(4 * args[0].numel() * args[1].shape[-2])
    if str(target) == "horsepower.windowed_attention.default":
        flops: int = OPS["attention"].cost(*args[:3], None, 1, [], *args[3:]).flops
        return flops
    packet = getattr(target, "overloadpacket", None)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=written[0]))
    name = getattr(packet, "__name__", "")
    if name in MOVES:
        return 0
    return values * (4 if "norm" in name or "softmax" in name else 1)


def _total(works: Any) -> Work:
    return sum(works, Work())


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 36."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
