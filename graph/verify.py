"""Every rewrite executed beside what it replaced, against float64.

Sites are cut from the lowered graph, so that the kernels run which the plan calls: the stages before it differ in how
calls are grouped, not in what is computed. Of equal sites (calls, shapes, dtypes, constants) one is executed, with its
own weights; each of its inputs takes the value that it has in the model, then random and hostile ones.

The rule, per value that others read: error(fused) <= max(1.1 x error(eager), 4 ulp of its dtype) in relative L2, and
non-finite only where eager is. Where rows are many it must hold, too, over those beside the edges of the inputs alone,
which would drown among the others. A kernel may flush denormals, as the bfloat16 products of CPUs do: differences below
the smallest normal number then count as none, and the check says so.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from horsepower.graph.exact import Exact, beside
from horsepower.graph.graph import Graph
from horsepower.graph.provenance import Name, Region, layout, moves_nothing, regions, title
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import op_of

# Unit in the last place, as the kernels' tests take it: half of it for the 16-bit formats, whose errors are roundings.
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23, torch.float64: 2.0**-52}
AS_GIVEN = "as in the model"
HOSTILE = ("random", "huge", "largest", "tiny", "denormal", "constant rows", "zero rows")
FLUSHED = "flushes denormals"

MANY = 64  # rows
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
        checks += [site.check(kind, known) for kind in kinds if varies or kind == AS_GIVEN]
    return tuple(checks)


def check_whole(
    captured: Graph, run: Run, weights: Mapping[str, Tensor], inputs: Sequence[Any], what: str = AS_GIVEN
) -> Check:
    """The whole model end to end: error(fused) <= 1.1 x error(eager), or 4 ulp, over all floats of the outputs pooled.

    Their number, shapes and dtypes must be eager's; integers and booleans must be equal.
    run: the compiled model, called with the flattened inputs.
    """
    eager, _ = _execute(captured, weights, inputs, _eager)
    exact, _ = _execute(captured, weights, inputs, Exact())
    name, found = _compare_all(pytree.tree_leaves(run(*inputs)), eager, exact)
    errors = (found.eager, found.fused, found.bound, found.passed)
    return Check(None, "all passes", "", (), what, name, *errors, 1, note=found.note)


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
            node: value
            if kind == AS_GIVEN or not self.varies(node, value)
            else _hostile(value, kind, generator, scores)
            for node, value in ((node, known[node]) for node in region.inputs)
        }
        kernels = tuple(title(node) for node in region.fused if not moves_nothing(node))
        head = (self.number, self.rewrite, region.module, kernels, kind)
        eager = _computed(region.replaced, given, _eager)
        truth = Exact(region.replaced, self.edges)
        exact = _computed(region.replaced, given, truth)
        try:
            fused = _computed(region.fused, {node: given[twin] for node, twin in region.reads.items()}, _poisoned)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # a wrong rewrite may not even run
            return Check(*head, "", 0.0, torch.inf, 0.0, False, self.count, note=str(error).splitlines()[0])
        found: list[tuple[Name, Comparison]] = []
        for node, twin in region.outputs:
            values = zip(_tensors(fused[node]), _tensors(eager[twin]), _tensors(exact[twin]), strict=True)
            for got, want, right in values:
                found.append((twin.name, _compare(got, want, right, truth.index)))
                if want.ndim > 1 and want.shape[0] > MANY:
                    edges = torch.tensor(beside(self.edges, want.shape[0]))
                    found.append((f"{twin.name}, edge rows", _compare(got, want, right, edges)))
        name, worst = max(found, key=lambda each: each[1].badness)
        rows = None if truth.index is None else len(truth.index)
        return Check(*head, name, worst.eager, worst.fused, worst.bound, worst.passed, self.count, rows, worst.note)

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


@dataclass(frozen=True)
class Comparison:
    """Errors of one value, as in Check."""

    eager: float
    fused: float
    bound: float
    passed: bool
    note: str = ""

    @property
    def badness(self) -> tuple[bool, bool, float]:
        return not self.passed, bool(self.note), self.fused / self.bound if self.bound else self.fused


def _compare(fused: Tensor, eager: Tensor, exact: Tensor, rows: Tensor | None = None) -> Comparison:
    """Over what is finite in eager, or some rows of it; float64 `exact` stands for what has the dtype of `eager`."""
    if fused.shape != eager.shape or fused.dtype != eager.dtype:
        made, wanted = (f"{list(x.shape)} {x.dtype}" for x in (fused, eager))
        return Comparison(0.0, torch.inf, 0.0, False, f"{made} instead of {wanted}")
    if rows is not None:
        fused, eager, exact = (x[rows] for x in (fused, eager, exact))
    if not eager.is_floating_point():
        same = torch.equal(fused, eager)
        return Comparison(0.0, 0.0 if same else torch.inf, 0.0, same, "" if same else "differs from eager")
    finite = eager.isfinite() & exact.isfinite()
    truth = exact[finite]
    off_eager, off_fused = (x[finite].double() - truth for x in (eager, fused))
    error_eager, error_fused = _relative(off_eager, truth), _relative(off_fused, truth)
    bound = max(1.1 * error_eager, 4 * ULP[eager.dtype])
    if not bool(off_fused.isfinite().all()):
        return Comparison(error_eager, torch.inf, bound, False, "non-finite where eager is not")
    if error_fused <= bound:
        return Comparison(error_eager, error_fused, bound, True)
    visible = off_fused.where(off_fused.abs() >= torch.finfo(eager.dtype).tiny, 0)
    flushed = _relative(visible, truth) <= bound
    return Comparison(error_eager, error_fused, bound, flushed, FLUSHED if flushed else "")


def _compare_all(fused: Sequence[Any], eager: Sequence[Any], exact: Sequence[Any]) -> tuple[str, Comparison]:
    """The first output that cannot be eager's, by its place, or the floats of all of them."""
    if len(fused) != len(eager):
        return "outputs", Comparison(0.0, torch.inf, 0.0, False, f"{len(fused)} outputs instead of {len(eager)}")
    floats: list[tuple[Tensor, Tensor, Tensor]] = []
    for place, (got, want, right) in enumerate(zip(fused, eager, exact, strict=True)):
        if not isinstance(want, Tensor) or not isinstance(got, Tensor):
            one, other = ("a tensor" if isinstance(x, Tensor) else x for x in (got, want))
            if one != other:
                return f"output {place}", Comparison(0.0, torch.inf, 0.0, False, f"{one} instead of {other}")
        elif (got.shape, got.dtype) == (want.shape, want.dtype) and (want.is_floating_point() or want.is_complex()):
            one, other, true = (
                torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (got, want, right)
            )
            floats.append((one.flatten(), other.flatten(), true.flatten()))
        elif not (found := _compare(got, want, right)).passed:
            return f"output {place}", found
    if not floats:
        return "outputs", Comparison(0.0, 0.0, 0.0, True)
    return "outputs", _compare(*map(torch.cat, zip(*floats, strict=True)))


def _relative(difference: Tensor, truth: Tensor) -> float:
    norm, size = float(difference.norm()), float(truth.norm())
    return norm / size if size else (0.0 if norm == 0 else torch.inf)


def _scale(kind: str, dtype: torch.dtype, scores: bool) -> float:
    """Of normal values. The largest have squares that overflow; where they make `scores`, sums of 64 products do not.

    A score that overflows has no right answer: eager yields NaN, but 0 in the rows where all are -inf.
    """
    limits = torch.finfo(dtype)
    largest = float(limits.max**0.5) / (32 if scores else 1)
    scales: dict[str, float] = {"huge": 1e4, "largest": largest, "tiny": limits.tiny**0.5, "denormal": limits.tiny / 16}
    return scales.get(kind, 1.0)


def _hostile(value: Tensor, kind: str, generator: torch.Generator, scores: bool) -> Tensor:
    """Normal values, scaled or with rows replaced, in the strides of `value`; NaN lies between its rows."""
    made = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    if kind == "constant rows" and made.ndim:
        made = made[..., :1].expand(value.shape)
    elif kind == "zero rows" and made.ndim and made.shape[0]:
        made[::3] = 0
        made[-1] = 0
    made = (made * _scale(kind, value.dtype, scores)).to(value.device, value.dtype)
    if value.numel() == 0 or 0 in value.stride():
        return made
    reach = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True)) + 1
    room = torch.full((reach,), torch.nan, dtype=value.dtype, device=value.device)
    return room.as_strided(value.shape, value.stride()).copy_(made)


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
