"""What a step must take on a GPU: the kernels of a graph, each against the ceilings of arithmetic and of memory.

    time of a kernel = max(FLOPs / rate of its unit, bytes / bandwidth)

Kernels run one after another; launches, the last wave of a grid and caches are not counted. With the datasheet's rates
that time is a floor; with the rates that the best published kernels reach it is a prediction.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import fx

from horsepower.graph.explain import Measured, block_of
from horsepower.graph.graph import Graph
from horsepower.graph.provenance import is_size, moves_nothing, title

Unit = Literal["matrix", "attention", "vector"]
UNITS: tuple[Unit, ...] = get_args(Unit)
MATRIX = {"aten.linear", "aten.matmul", "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"}
ATTENTION = {"attention", "windowed_attention", "aten.scaled_dot_product_attention"}


@dataclass(frozen=True)
class Rates:
    """FLOP/s by unit, bytes/s of memory. A unit that is not there is None."""

    matrix: float  # dense bfloat16
    fp8: float | None  # dense
    attention: float  # bfloat16
    vector: float  # float32 without matrix units: elementwise work, products of float32
    memory: float

    def seconds(self, kernel: "Kernel") -> float:
        return max(kernel.flops / self.of(kernel.unit), kernel.bytes / self.memory)

    def of(self, unit: Unit) -> float:
        return {"matrix": self.matrix, "attention": self.attention, "vector": self.vector}[unit]

    def bound(self, kernel: "Kernel") -> str:
        """What the kernel waits for: its unit, or memory."""
        return kernel.unit if kernel.flops / self.of(kernel.unit) >= kernel.bytes / self.memory else "memory"


@dataclass(frozen=True)
class GPU:
    name: str
    target: str  # whose kernels it runs
    peak: Rates  # datasheet: no kernel is faster
    reached: Rates  # by the best published kernels at sizes like these


# peak: NVIDIA H100 datasheet, SXM5, without sparsity. reached: cuBLAS bfloat16 700 to 800 TFLOP/s, cuBLASLt FP8 1200 to
# 1500, FlashAttention 3 at head 128, not causal, long: 640 to 650, of which 620 are planned with; the best RMS norms
# reach 3.0 TB/s.
_H100 = GPU(
    "NVIDIA H100 SXM",
    "sm_90",
    Rates(matrix=989.4e12, fp8=1978.9e12, attention=989.4e12, vector=66.9e12, memory=3.35e12),
    Rates(matrix=800e12, fp8=1450e12, attention=620e12, vector=66.9e12, memory=3.0e12),
)

# peak: NVIDIA H200 datasheet, SXM: an H100's arithmetic, faster memory. reached: as an H100, in memory its share.
_H200 = GPU(
    "NVIDIA H200 SXM",
    "sm_90",
    Rates(matrix=989.4e12, fp8=1978.9e12, attention=989.4e12, vector=66.9e12, memory=4.8e12),
    Rates(matrix=800e12, fp8=1450e12, attention=620e12, vector=66.9e12, memory=4.8e12 * 3.0 / 3.35),
)

# peak: NVIDIA A100 datasheet, SXM4, 80 GB; no FP8. reached: FlashAttention 2 204 TFLOP/s; products and memory are not
# published at these sizes: the shares of the peaks that an H100 reaches.
_A100 = GPU(
    "NVIDIA A100 SXM 80 GB",
    "sm_80",
    Rates(matrix=312e12, fp8=None, attention=312e12, vector=19.5e12, memory=2.039e12),
    Rates(matrix=312e12 * 800 / 989.4, fp8=None, attention=204e12, vector=19.5e12, memory=2.039e12 * 3.0 / 3.35),
)
GPUS = {"h100": _H100, "h200": _H200, "a100": _A100}


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


def ladder(captured: Graph, parts: Graph, plan: Graph, inputs: Sequence[Any]) -> tuple[Rung, ...]:
    """How a model runs before and after its fusions.

    captured: as `capture` made it; parts: with each fused operator as a product and an epilogue; plan: as it is lowered
    for a GPU.
    inputs: the flattened inputs of the sizes to count for, on any device.
    """
    eager = Measured.of(captured, inputs)
    return (
        Rung("eager", tuple(_kernel([node], eager) for node in eager.work)),
        Rung("chains fused", tuple(_kernel(group, eager) for group in _chains(eager))),
        Rung("parts", _each(parts, inputs)),
        Rung("plan", _each(plan, inputs)),
    )


def grouped(kernels: Iterable[Kernel]) -> list[tuple[Kernel, int]]:
    """Equal kernels and how often they run."""
    return list(Counter(kernels).items())


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
        return "attention"
    if name in MATRIX or name.startswith("linear"):
        return "matrix" if node.all_input_nodes[0].meta["val"].itemsize <= 2 else "vector"
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
