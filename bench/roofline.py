"""What a step must take on a GPU: the kernels of a graph, each against the ceilings of arithmetic and of memory.

    time of a kernel = max(FLOPs / rate of its unit, bytes / bandwidth)

Kernels run one after another; launches, the last wave of a grid and caches are not counted. With the datasheet's rates
that time is a floor; with the rates that the best published kernels reach it is a prediction.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from horsepower.graph.explain import Measured, block_of
from horsepower.graph.graph import Graph
from horsepower.graph.provenance import is_size, moves_nothing, title
from horsepower.kernels.rates import Rates, Unit, unit_of_attention, unit_of_product
from horsepower.kernels.registry import OPS, Op

MATRIX = {"aten.linear", "aten.matmul", "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"}
ATTENTION = {"attention", "windowed_attention", "aten.scaled_dot_product_attention"}


@dataclass(frozen=True)
class Kernel:
    """One launch."""

    name: str  # of the operator, or of the operators that it computes together
    where: str  # the weight of a product, else the module, without the number of the block
    unit: Unit
    flops: int
    bytes: int  # read and written, each once


@dataclass(frozen=True)
class Rung:
    """The kernels of a step, compiled in one way."""

    name: str
    kernels: tuple[Kernel, ...]

    def seconds(self, rates: Rates, unit: Unit | None = None) -> float:
        """Of a step; of one unit's kernels alone."""
        return sum(rates.seconds(kernel) for kernel in self.kernels if unit in (None, kernel.unit))

    def total(self, of: Literal["flops", "bytes"], unit: Unit | None = None) -> int:
        return sum(getattr(kernel, of) for kernel in self.kernels if unit in (None, kernel.unit))


def ladder(captured: Graph, parts: Graph, plans: Mapping[str, Graph], inputs: Sequence[Any]) -> tuple[Rung, ...]:
    """How a model runs before and after its fusions.

    captured: as `capture` made it; parts: with each fused operator as a product and an epilogue; plans: by their names,
    as they are lowered for a GPU.
    inputs: the flattened inputs of the sizes to count for, on any device.
    """
    eager = Measured.of(captured, inputs)
    return (
        Rung("eager", tuple(_kernel([node], eager) for node in eager.work)),
        Rung("chains fused", tuple(_kernel(group, eager) for group in _chains(eager))),
        Rung("parts", _each(parts, inputs)),
        *(Rung(name, _each(plan, inputs)) for name, plan in plans.items()),
    )


def grouped(kernels: Iterable[Kernel]) -> list[tuple[Kernel, int]]:
    """Equal kernels and how often they run."""
    return list(Counter(kernels).items())


def calls_of(graph: Graph, inputs: Sequence[Any]) -> dict[Kernel, tuple[Op, tuple[Any, ...]]]:
    """Of each distinct kernel of our operators in a plan: the operator, and its arguments on the meta device."""
    found, fixed = Measured.of(graph, inputs), graph.fixed()
    nodes = [node for node in found.work if node in found.given and node not in fixed]
    return {_kernel([node], found): (OPS[title(node)], found.given[node]) for node in nodes}


def _each(graph: Graph, inputs: Sequence[Any]) -> tuple[Kernel, ...]:
    """Each call a kernel; what depends on weights alone has run when the plan was loaded."""
    found, fixed = Measured.of(graph, inputs), graph.fixed()
    return tuple(_kernel([node], found) for node in found.work if node not in fixed)


def _kernel(group: Sequence[fx.Node], found: Measured) -> Kernel:
    """One kernel for all calls of a group: what passes between them does not pass memory."""
    return Kernel(
        " + ".join(dict.fromkeys(map(title, group))),
        _where(group[-1]),
        _unit(group[-1]),
        sum(found.work[node].flops for node in group),
        _boundary(group, found) if len(group) > 1 else found.work[group[0]].bytes,
    )


def _unit(node: fx.Node) -> Unit:
    name = title(node)
    if name in ATTENTION:
        return unit_of_attention(node.all_input_nodes[0].meta["val"].dtype)
    if name in MATRIX or name.startswith("linear"):
        return unit_of_product(node.all_input_nodes[0].meta["val"].dtype)
    return "vector"


def _where(node: fx.Node) -> str:
    """block.layers.4.mlp.down_proj.weight -> mlp.down_proj."""
    module = str(node.meta["module"])
    if title(node).split(".")[-1].startswith("linear"):
        source = node.all_input_nodes[1]
        while source.op == "call_function" and source.all_input_nodes:
            source = source.all_input_nodes[0]
        module = str(source.target).removesuffix(".weight") if source.op == "get_attr" else module
    return module[len(block_of(module)) :].strip(".") or module or "the model"


def _chains(found: Measured) -> list[list[fx.Node]]:
    """The calls of each kernel if connected elementwise calls, norms and copies are fused, as Inductor can at best.

    Products and attention stay as they are, and part what lies before them from what lies after: calls are fused if a
    path of such calls connects them and equally many products lie before both, so that no kernel waits for itself.
    """
    depth: dict[fx.Node, int] = {}
    leader: dict[fx.Node, fx.Node] = {}
    groups: dict[fx.Node, list[fx.Node]] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in found.work:
        sources = {_base(source) for source in node.all_input_nodes if not is_size(source)} & leader.keys()
        depth[node] = max((depth[source] + _alone(source) for source in sources), default=0)
        leader[node] = node
        for source in sources:
            if not _alone(node) and not _alone(source) and depth[source] == depth[node]:
                leader[find(source)] = find(node)
    for node in found.work:
        groups.setdefault(find(node), []).append(node)
    return list(groups.values())


def _alone(node: fx.Node) -> bool:
    """Whether it is a kernel of a library, with which nothing is fused."""
    return title(node) in MATRIX | ATTENTION


def _boundary(group: Sequence[fx.Node], found: Measured) -> int:
    """Bytes that a group reads from outside and writes for others: each value once, of a view only what it shows."""
    inside = set(group)
    read: Counter[fx.Node] = Counter()
    for view in {view for node in group for view in node.all_input_nodes if not is_size(view)}:
        base = _base(view)
        if base not in inside:
            read[base] = min(read[base] + found.sizes[view], found.sizes[base])
    written = sum(found.sizes[node] for node in group if any(user not in inside for user in _users(node)))
    return read.total() + written


def _base(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and moves_nothing(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _users(node: fx.Node) -> Iterable[fx.Node]:
    """What reads a value, or views of it."""
    for user in node.users:
        if user.op == "call_function" and moves_nothing(user):
            yield from _users(user)
        else:
            yield user
