"""Every rewrite executed beside what it replaced, against float64.

Sites are cut from the lowered graph, so that the kernels run which the plan calls: the stages before it differ in how
calls are grouped, not in what is computed. Of equal sites (calls, shapes, dtypes, constants) one is executed, with its
own weights; each of its inputs takes the value that it has in the model, then random and hostile ones.

The rule, per value that others read: error(fused) <= max(1.1 x error(eager), 4 ulp of its dtype) in relative L2, and
non-finite only where eager is. Where rows are many it must hold, too, over those beside the edges of the inputs alone,
which would drown among the others. A kernel may flush denormals, as the bfloat16 products of CPUs do: differences below
the smallest normal number then count as none, and the check says so.

Under a scheme what reads or makes codes is not near float64 of the model. There the rule holds between kernels and
plain operators on the same codes; how far that is from the model without codes has a budget, and a check of its own.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from horsepower.graph.compare import FLUSHED, Comparison, compare, compare_all, relative
from horsepower.graph.exact import Exact, beside, by_references, flushing, uncoded
from horsepower.graph.graph import Graph
from horsepower.graph.hostile import HOSTILE, hostile
from horsepower.graph.passes.quantise import LINEARS
from horsepower.graph.provenance import Name, Region, layout, moves_nothing, regions, title
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import op_of
from horsepower.quant.budget import BUDGET
from horsepower.quant.scheme import Scheme

AS_GIVEN = "as in the model"

MANY = 64  # rows
# Of the outputs of one step. 40 layers of random weights show 0.043 to 0.045 with weights in e4m3, 0.060 to 0.064 with
# inputs too (0.004 in 16 bits), whatever the variant and the lengths; this is 1.6 times the largest, as BUDGET is of a
# product. Final latents, which eight steps lead to, have a budget of their own.
STEP_BUDGET = 0.1
ATTENTIONS = (ops.attention.default,)

Env: TypeAlias = dict[fx.Node, Any]
Run: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Check:
    """One distinct site on one kind of inputs, or the whole model; errors are relative L2 against float64."""

    site: int | None  # in the order of the plan; None for the whole model
    rewrite: str  # the last pass that changed it
    module: str  # path of the first such site; "" for the whole model
    kernels: tuple[str, ...]  # that the plan calls there
    inputs: str  # AS_GIVEN or one of HOSTILE
    value: str  # captured name of the worst output
    error_eager: float
    error_fused: float  # infinite for what is non-finite where eager is not, or could not be computed
    bound: float
    passed: bool
    count: int  # equal sites
    rows: int | None = None  # rows compared, where not all are
    note: str = ""  # FLUSHED, or why there is no error
    scheme: str = ""  # whose distance from the model without codes this is; `bound` is its budget

    @property
    def severity(self) -> float:
        """The error in units of the bound."""
        return self.error_fused / self.bound if self.bound else self.error_fused


def check_sites(
    captured: Graph,
    compiled: Graph,
    changed: Mapping[Name, Sequence[str]],
    weights: Mapping[str, Tensor],
    inputs: Sequence[Any],
    kinds: Sequence[str] = (AS_GIVEN, *HOSTILE),
) -> tuple[Check, ...]:
    """Every distinct site of the compiled graph on every kind of inputs.

    changed: the passes behind each value, from `provenance.rewrite`. weights: parameters and buffers by name.
    inputs: the flattened inputs at the sizes to verify, where the weights lie.
    """
    groups: dict[object, list[Region]] = {}
    for region in regions(captured, compiled):
        groups.setdefault(_signature(region), []).append(region)
    wanted = {node for group in groups.values() for node in group[0].inputs}
    _, known = _execute(captured, weights, inputs, _eager, wanted)
    fixed = captured.fixed()
    edges = _edges(inputs)
    checks: list[Check] = []
    for number, group in enumerate(groups.values()):
        site = _Site(number, group[0], group[0].rewrite(changed), len(group), edges, fixed)
        varies = any(site.varies(node, known[node]) for node in group[0].inputs)
        mine = [site.check(kind, known) for kind in kinds if varies or kind == AS_GIVEN]
        checks += mine
        if site.coded and compiled.scheme is not None and not any(check.note and not check.passed for check in mine):
            checks.append(site.distance(known, compiled.scheme))
    return tuple(checks)


def check_whole(
    graph: Graph, run: Run, weights: Mapping[str, Tensor], inputs: Sequence[Any], what: str = AS_GIVEN
) -> Check:
    """The whole model end to end: error(fused) <= 1.1 x error(eager), or 4 ulp, over all floats of the outputs pooled.

    Their number, shapes and dtypes must be eager's; integers and booleans must be equal.
    graph: as it was captured; under a scheme as it was compiled, whose plain operators are the eager ones.
    run: the compiled model, called with the flattened inputs.
    """
    calls = (_eager, Exact()) if graph.scheme is None else (by_references, Exact().by_references)
    eager, exact = (_execute(graph, weights, inputs, call)[0] for call in calls)
    name, found = compare_all(pytree.tree_leaves(run(*inputs)), eager, exact)
    errors = (found.eager, found.fused, found.bound, found.passed)
    return Check(None, "all passes", "", (), what, name, *errors, 1, note=found.note)


def check_distances(
    captured: Graph, run: Run, weights: Mapping[str, Tensor], inputs: Sequence[Any], scheme: str
) -> tuple[Check, ...]:
    """How far each output of the whole model is from float64 without codes, beside eager in 16 bits."""
    eager, exact = (_execute(captured, weights, inputs, call)[0] for call in (_eager, Exact()))
    outputs = zip(pytree.tree_leaves(run(*inputs)), eager, exact, strict=True)
    return tuple(
        _distance(None, "", 1, [(f"output {place}", *values)], STEP_BUDGET, scheme)
        for place, values in enumerate(outputs)
        if isinstance(values[1], Tensor) and values[1].is_floating_point()
    )


def _distance(
    site: int | None,
    module: str,
    count: int,
    values: Sequence[tuple[str, Tensor, Tensor, Tensor]],
    budget: float,
    scheme: str,
) -> Check:
    """Of the worst of some values: its name, the scheme's, eager's, exact."""

    def off(value: Tensor, truth: Tensor) -> float:
        error = relative(value.double() - truth, truth)
        return error if math.isfinite(error) else math.inf

    errors = ((off(got, right), off(own, right), name) for name, got, own, right in values)
    error, eager, name = max(errors)
    head = (site, "quantise", module, (), AS_GIVEN, name)
    return Check(*head, eager, error, budget, error <= budget, count, scheme=scheme)


@dataclass(frozen=True)
class _Site:
    number: int
    region: Region
    rewrite: str
    count: int
    edges: tuple[int, ...]
    fixed: set[fx.Node]

    def check(self, kind: str, known: Env) -> Check:
        region = self.region
        generator = torch.Generator().manual_seed(0)
        scores = any(node.target in ATTENTIONS for node in region.fused)
        given = {
            node: value if kind == AS_GIVEN or not self.varies(node, value) else hostile(value, kind, generator, scores)
            for node, value in ((node, known[node]) for node in region.inputs)
        }
        kernels = tuple(title(node) for node in region.fused if not moves_nothing(node))
        head = (self.number, self.rewrite, region.module, kernels, kind)
        here = {node: given[twin] for node, twin in region.reads.items()}
        try:
            fused = _computed(region.fused, here, _poisoned)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # a wrong rewrite may not even run
            return Check(*head, "", 0.0, torch.inf, 0.0, False, self.count, note=str(error).splitlines()[0])
        truth = Exact(() if self.coded else region.replaced, self.edges)
        if self.coded:
            eager, exact = (_computed(region.fused, here, call) for call in (by_references, truth.by_references))
            name, worst = self._worst(fused, eager, exact, None)
            if not worst.passed:  # a norm behind a product may make visible what that took for zero
                calls = map(flushing, (by_references, truth.by_references))
                eager, exact = (_computed(region.fused, here, call) for call in calls)
                other, flushed = self._worst(fused, eager, exact, None)
                name, worst = (other, replace(flushed, note=FLUSHED)) if flushed.passed else (name, worst)
        else:
            eager, exact = (_computed(region.replaced, given, call) for call in (_eager, truth))
            name, worst = self._worst(fused, eager, exact, truth.index)
        rows = None if truth.index is None else len(truth.index)
        return Check(*head, name, worst.eager, worst.fused, worst.bound, worst.passed, self.count, rows, worst.note)

    def _worst(self, fused: Env, eager: Env, exact: Env, index: Tensor | None) -> tuple[str, Comparison]:
        """Of the values that others read, whole and beside the edges; index: the rows that were computed exactly."""
        found: list[tuple[str, Comparison]] = []
        for node, twin in self.region.outputs:
            plain = node if self.coded else twin
            values = zip(_tensors(fused[node]), _tensors(eager[plain]), _tensors(exact[plain]), strict=True)
            for got, want, right in values:
                found.append((twin.name, compare(got, want, right, index)))
                if want.ndim > 1 and want.shape[0] > MANY:
                    edges = torch.tensor(beside(self.edges, want.shape[0]))
                    found.append((f"{twin.name}, edge rows", compare(got, want, right, edges)))
        return max(found, key=lambda each: each[1].badness)

    @property
    def coded(self) -> bool:
        """Whether codes of eight bits are read or made."""
        nodes = (*self.region.fused, *self.region.reads)
        return any(x.dtype == E4M3 for node in nodes for x in _tensors(node.meta["val"]))

    def distance(self, known: Env, scheme: Scheme) -> Check:
        """On the model's own inputs: of products, where all that is rounded is weights.

        Else codes tie layers together, up to a whole step, and it is that of what others read of all these.
        """
        region = self.region
        here = {node: known[twin] for node, twin in region.reads.items()}
        fused, truth = _computed(region.fused, here, _poisoned), Exact()
        if scheme.inputs is None:
            calls = map(uncoded, (by_references, truth.by_references))
            eager, exact = (_computed(region.fused, here, call) for call in calls)
            places, budget = [(node, node) for node in region.fused if node.target in LINEARS], BUDGET
        else:
            given = {node: known[node] for node in region.inputs}
            eager, exact = (_computed(region.replaced, given, call) for call in (_eager, truth))
            places, budget = list(region.outputs), STEP_BUDGET
        values = [
            (twin.name, *each)
            for node, twin in places
            for each in zip(_tensors(fused[node]), _tensors(eager[twin]), _tensors(exact[twin]), strict=True)
        ]
        return _distance(self.number, region.module, self.count, values, budget, scheme.name)

    def varies(self, node: fx.Node, value: Any) -> bool:
        """Whether an input is an activation, not a weight, a number or an index."""
        return (
            node.op != "get_attr" and node not in self.fixed and isinstance(value, Tensor) and value.is_floating_point()
        )


def _execute(
    graph: Graph, weights: Mapping[str, Tensor], inputs: Sequence[Any], call: Run, wanted: Iterable[fx.Node] = ()
) -> tuple[list[Any], Env]:
    """Outputs and the wanted values of a graph; what is needed no more is freed."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes.nodes:
        last |= dict.fromkeys((node, *node.all_input_nodes), node)
    kept = set(wanted)
    env: Env = {node: given for node, given in zip(graph.inputs, inputs, strict=True) if isinstance(node, fx.Node)}
    outputs: list[Any] = []
    with torch.no_grad():
        for node in graph.nodes.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                env[node] = graph.constants[name] if name in graph.constants else weights[name]
            elif node.op == "call_function":
                env |= _computed((node,), env, call)
                for value in {node, *node.all_input_nodes} - kept:
                    if last[value] is node:
                        del env[value]
            elif node.op == "output":
                outputs = list(fx.map_arg(node.args[0], env.__getitem__))
    return outputs, {node: env[node] for node in kept}


def _computed(nodes: Sequence[fx.Node], known: Env, call: Run) -> Env:
    """The values of these nodes from known ones."""
    env = dict(known) if len(nodes) > 1 else known
    made: Env = {}
    with torch.no_grad():
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            made[node] = call(node.target, *args, **kwargs)
            if env is not known:
                env[node] = made[node]
    return made


def _eager(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def _poisoned(target: Any, *args: Any, **kwargs: Any) -> Any:
    """A call whose outputs are NaN before the kernel writes them: what it forgets must not be what was there before."""
    op = op_of(str(target))
    if op is None:
        return target(*args, **kwargs)
    shape_rule = op.outputs

    def outputs(*inputs: Any) -> tuple[Tensor, ...]:
        return tuple(x.fill_(torch.nan) if x.is_floating_point() else x for x in shape_rule(*inputs))

    results = replace(op, outputs=outputs)(*args, **kwargs)
    return results[0] if op.single else results


def _signature(region: Region) -> object:
    """Regions with equal signatures call the same kernels on the same shapes in place of the same calls."""
    places: dict[fx.Node, str] = {}

    def described(nodes: Sequence[fx.Node]) -> Iterator[object]:
        for node in nodes:
            for value in node.all_input_nodes:
                if value not in places:
                    places[value] = f"%{len(places)}"
                    yield value.op, layout(value)
            places[node] = f"%{len(places)}"
            yield str(node.target), str(fx.map_arg((node.args, node.kwargs), lambda n: places[n])), layout(node)

    path = re.sub(r"\d+", "*", region.module)
    return path, tuple(described(region.fused)), tuple(described(region.replaced))


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]


def _edges(inputs: Sequence[Any]) -> tuple[int, ...]:
    """Where the rows of one input end and the next one's begin, if they are laid end to end."""
    ends, total = [], 0
    for given in inputs:
        if isinstance(given, Tensor) and given.ndim:
            total += given.shape[0]
            ends.append(total)
    return tuple(ends)
