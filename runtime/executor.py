"""Plan + weights + inputs -> outputs, in an arena whose tensors are made once for each set of sizes."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from horsepower.graph.call import Call, Ref, Weight
from horsepower.graph.contract import IntegerRule, TensorRule
from horsepower.graph.memory import Layout, Place
from horsepower.graph.operators import name_of, operator_of, writer_of
from horsepower.graph.plan import Plan
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import op_of
from horsepower.quant.quantised import Quantised, Values, check_pair, plain, quantised
from horsepower.runtime.devices import StreamOrder, check_free, current
from horsepower.runtime.replay import Replay, capture

Env = dict[str, Any]
Step = Callable[[Env], None]
Read = Callable[[Env], tuple[list[Any], dict[str, Any]]]
Around = Callable[[Call, Step], Step]  # what is executed in a step's stead

QUANTISERS = tuple(map(name_of, (ops.quantise.default, ops.quantise_tensor.default)))  # of weights, at load
PROGRAMS = 8  # sets of sizes that an arena remembers: a prompt has its own token count, and a clip several steps


class Executor:
    """A plan with its weights. What depends on weights alone is computed here, once.

    Each thread that runs takes an arena of its own for as long as its call lasts; there are as many as ran at once.
    """

    def __init__(self, plan: Plan, weights: Values):
        """`weights`: every parameter and buffer by name, each asked for once; it may lie elsewhere than the plan.

        A weight on the plan's device that no recipe changes is used as it is; one that the plan quantises may be so
        already. Raises ValueError for a missing one, or another shape or dtype.
        """
        self.plan = plan
        there = {*weights, *plan.constants}  # their names: to look for one in a Mapping is to ask for it
        if missing := [weight.name for weight in plan.weights if weight.name not in there]:
            raise ValueError(f"weights: {missing[0]} is missing, and {len(missing) - 1} more")
        with torch.no_grad(), current(plan.device):
            self._fixed = _loaded(plan, weights)
        self._idle: list[_Arena] = []
        self._around: Around | None = None

    def watched(self, around: Around) -> "Executor":
        """An executor of the same plan and weights, in arenas of its own, that executes `around(call, step)`.

        `around` is asked when a call is bound, at the first run with new sizes; other executors pay nothing.
        """
        twin = copy.copy(self)
        twin._idle, twin._around = [], around
        return twin

    @property
    def arena_bytes(self) -> int:
        """Of the arenas that no call uses now, with the buffers of their CUDA graphs."""
        return sum(arena.bytes for arena in list(self._idle))

    def drop_arenas(self) -> None:
        """Give back all memory but the weights', with the programs and CUDA graphs that refer to it.

        Not while a call runs.
        """
        while self._idle:
            self._idle.pop().finish()

    def to(self, device: torch.device) -> "Executor":
        """Bring the finished weights to a device, such as the host to wait there; arenas are dropped.

        Calls need them on the plan's device. Not while a call runs.
        """
        self.drop_arenas()
        moved: dict[int, torch.UntypedStorage] = {}  # what shares memory shares it there
        for name, value in self._fixed.items():
            if isinstance(value, Tensor) and value.device != device:
                self._fixed[name] = _moved(value, device, moved)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Check the inputs, run the calls. Outputs share memory with nothing that the plan holds or was given.

        Raises ValueError for inputs that break the contract.
        """
        given, sizes = self.plan.contract.check(args, kwargs)
        with current(self.plan.device):
            return self._run(given, sizes)

    def _run(self, given: list[Any], sizes: Mapping[str, int]) -> Any:
        try:
            arena = self._idle.pop()
        except IndexError:
            arena = _Arena(self.plan, self._fixed, self._around)
        try:
            with torch.inference_mode(False), torch.no_grad():  # an arena made in that mode could not be used outside
                flat = arena.run(given, sizes)
        finally:
            self._idle.append(arena)
        return pytree.tree_unflatten(flat, self.plan.out_spec)


def _loaded(plan: Plan, weights: Values) -> Env:
    """What the calls read of weights and of what is made from them. On the way a weight or two lie there beside it."""
    env: Env = {}
    names = {weight.value: weight.name for weight in plan.weights}
    for load in plan.loading:
        for weight in load.takes:
            env[weight.value] = _taken(weight, plan.constants if weight.name in plan.constants else weights)
        if load.call is not None:
            _load(load.call, env, names)
        for name in load.frees:
            env.pop(name)
    return {name: plain(names.get(name, name), value) for name, value in env.items()}


def _load(call: Call, env: Env, names: Mapping[str, str]) -> None:
    """Execute a call; a weight that comes quantised already is the result of the call that would quantise it."""
    given = {name: env[name] for name in call.reads}
    if call.target in QUANTISERS:
        ((value, weight),) = given.items()
        name, (codes, scales) = names.get(value, value), call.makes
        count = int(scales.shape[0])
        if isinstance(weight, Quantised):
            check_pair(name, weight, codes.shape, count)
        env[call.result] = tuple(weight if isinstance(weight, Quantised) else quantised(name, weight, count))
        return
    for name, value in given.items():
        plain(names.get(name, name), value)
    _fresh(call, _reader(call, {}))(env)


def _taken(weight: Weight, known: Values) -> Tensor | Quantised:
    got, spec = known[weight.name], weight.spec
    if isinstance(got, Quantised):
        return Quantised(*(x.to(spec.device) for x in got))
    if (tuple(got.shape), got.dtype) != (spec.shape, spec.dtype):
        raise ValueError(f"{weight.name}: got {list(got.shape)} {got.dtype}, allowed: {spec}")
    return got.to(spec.device)


def _moved(value: Tensor, device: torch.device, moved: dict[int, torch.UntypedStorage]) -> Tensor:
    storage = value.untyped_storage()
    key = storage.data_ptr()
    if key not in moved:
        moved[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
        moved[key].copy_(storage)
    place = (value.storage_offset(), value.size(), value.stride())
    return torch.empty(0, dtype=value.dtype, device=device).set_(moved[key], *place)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    buffers = module.named_buffers(remove_duplicate=False)
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(buffers)}


class _Arena:
    """Memory for one run at a time, and the programs that were made for it.

    On a GPU a program's first run records it, its second captures it as a CUDA graph; from then on that is replayed.
    """

    def __init__(self, plan: Plan, fixed: Env, around: Around | None):
        self._plan, self._fixed, self._around = plan, fixed, around
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._programs: OrderedDict[tuple[int, ...], _Program] = OrderedDict()
        self._order = StreamOrder(plan.device)

    @property
    def bytes(self) -> int:
        return self._memory.numel() + sum(program.captured_bytes for program in self._programs.values())

    def finish(self) -> None:
        """Wait until the memory can be given back."""
        self._order.finish()

    def run(self, given: list[Any], sizes: Mapping[str, int]) -> list[Any]:
        """The flattened outputs."""
        key = (*sizes.values(), torch.get_num_threads())  # scratch memory is as large as there are threads
        with self._order:
            if (program := self._programs.get(key)) is None:
                return self._first(key, given, self._plan.at(sizes))
            self._programs.move_to_end(key)
            return program.run(given, self._order)

    def _first(self, key: tuple[int, ...], given: list[Any], layout: Layout) -> list[Any]:
        if layout.arena > self._memory.numel():
            self._order.finish()
            self._programs.clear()  # they refer to the smaller arena
            self._memory = torch.empty(0, dtype=torch.uint8)
            check_free(layout.arena, layout.device)
            self._memory = torch.empty(layout.arena, dtype=torch.uint8, device=layout.device)
        program = _Program(self._plan, self._fixed, layout, self._memory, self._around)
        flat = program.record(given)
        self._programs[key] = program
        if len(self._programs) > PROGRAMS:
            self._programs.popitem(last=False)
        return flat


class _Program:
    """The calls at given sizes, bound to their memory.

    Values are placed (in the arena, or a weight) or fresh (an input, or what an operator allocated). A call that reads
    nothing fresh is bound once: its views are made, its kernel is chosen. Another is bound at each run.
    """

    def __init__(self, plan: Plan, fixed: Env, layout: Layout, memory: Tensor, around: Around | None):
        self._plan, self._layout, self._memory, self._around = plan, layout, memory, around
        self._placed = dict(fixed)
        self._steps: list[Step] = []
        self._sizes = {rule.name for rule in plan.contract.rules if isinstance(rule, IntegerRule)}
        self._held = {x.untyped_storage().data_ptr() for x in (memory, *fixed.values()) if isinstance(x, Tensor)}
        there = all(rule.spec.device == layout.device for rule in plan.contract.rules if isinstance(rule, TensorRule))
        # a graph could not be watched, and would keep what a number in the CPU's memory was when it was captured
        self._captures = layout.device.type == "cuda" and around is None and there
        self._replay: Replay | None = None

    @property
    def captured_bytes(self) -> int:
        return 0 if self._replay is None else self._replay.bytes

    def record(self, given: list[Any]) -> list[Any]:
        """The first run: bind and execute call by call."""
        env = self._inputs(given)
        self._placed.update({name: env[name] for name in self._sizes if name in env})  # the same in each run
        for i, call in enumerate(self._plan.calls):
            if step := self._bound(i, call, env):
                step = step if self._around is None else self._around(call, step)
                step(env)
                self._steps.append(step)
                self._check_written(i, call)
        return self._own(self._results(env), given)

    def run(self, given: list[Any], order: StreamOrder) -> list[Any]:
        """A further run, with inputs of the same sizes."""
        if self._captures:
            self._captures = False
            self._replay = capture(self._values, given, order.side)
        if self._replay is not None:
            return self._replay.run(given)
        return self._own(self._values(given), given)

    def _values(self, given: list[Any]) -> list[Any]:
        env = self._inputs(given)
        for step in self._steps:
            step(env)
        return self._results(env)

    def _inputs(self, given: list[Any]) -> Env:
        return {name: value for name, value in zip(self._plan.inputs, given, strict=True) if name}

    def _bound(self, i: int, call: Call, env: Env) -> Step | None:
        """How to execute a call from now on; None if its result is the same in each run."""
        read = _reader(call, self._placed)
        is_size = call.spec is None and (call.target.startswith("aten.sym_size") or self._sizes.issuperset(call.reads))
        is_view = call.spec is not None and not call.makes and self._placed.keys() >= set(call.reads)
        if is_size or is_view:
            args, kwargs = read(env)
            self._placed[call.result] = operator_of(call.target)(*args, **kwargs)
            if is_size:
                self._sizes.add(call.result)
            return None
        if (i, 0) not in self._layout.results:
            return _fresh(call, read)
        outputs = tuple(_tensor(self._memory, self._layout.results[i, k]) for k in range(len(call.makes)))
        offset, size = self._layout.workspaces.get(i, (0, 0))
        step = self._written(call, read, env, outputs, self._memory[offset : offset + size] if size else None)
        self._placed[call.result] = outputs if isinstance(call.spec, tuple) else outputs[0]
        return step

    def _written(self, call: Call, read: Read, env: Env, outputs: tuple[Tensor, ...], workspace: Tensor | None) -> Step:
        """A call that writes its results into given memory."""
        args, kwargs = read(env)
        if op := op_of(call.target):
            op.outputs(*(x.to("meta") if isinstance(x, Tensor) else x for x in args))  # refuses bad sizes
        write, frees = writer_of(call.target), call.frees
        assert write is not None
        if self._placed.keys() >= set(call.reads):
            best = op.writer(*args) if op else write
            return lambda _: best(outputs, workspace, *args, **kwargs)

        def step(env: Env) -> None:
            args, kwargs = read(env)
            write(outputs, workspace, *args, **kwargs)
            for name in frees:
                env.pop(name, None)

        return step

    def _check_written(self, i: int, call: Call) -> None:
        """An operator that resized what it was given has left its place: a fault of the plan, never a wrong number."""
        if (i, 0) in self._layout.results:
            value = self._placed[call.result]
            for k, x in enumerate(value if isinstance(call.spec, tuple) else (value,)):
                if tuple(x.shape) != self._layout.results[i, k].spec.shape:
                    raise RuntimeError(f"{call.target}: made {list(x.shape)}, planned: {call.makes[k]}")

    def _results(self, env: Env) -> list[Any]:
        values = {**env, **self._placed}
        return [values[value.name] if isinstance(value, Ref) else value for value in self._plan.outputs]

    def _own(self, flat: list[Any], given: list[Any]) -> list[Any]:
        """What the plan returns, copied if its memory is the plan's or the caller's."""
        held = self._held | {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
        return [x.clone() if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in held else x for x in flat]


def _tensor(memory: Tensor, place: Place) -> Tensor:
    """A place in memory as the tensor that it is."""
    spec = place.spec
    return memory[place.offset : place.offset + spec.bytes].view(spec.dtype).as_strided(spec.shape, spec.strides)


def _fresh(call: Call, read: Read) -> Step:
    """A call whose operator allocates its result, or views what is fresh."""
    run, result, frees = operator_of(call.target), call.result, call.frees

    def step(env: Env) -> None:
        args, kwargs = read(env)
        env[result] = run(*args, **kwargs)
        if call.makes:
            env[result] = _apart(env[result], (args, kwargs))
        for name in frees:
            env.pop(name, None)

    return step


def _apart(made: Any, given: Any) -> Any:
    """What an operator made, copied if it is a view after all: at other sizes, such as 1, a reshape may be one."""
    held = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves(given) if isinstance(x, Tensor)}

    def own(x: Tensor) -> Tensor:
        return x.clone() if x.untyped_storage().data_ptr() in held else x

    return pytree.tree_map_only(Tensor, own, made)


def _reader(call: Call, placed: Env) -> Read:
    """How to get the arguments out of what is placed and what is fresh."""
    args = [_value(arg, placed) for arg in call.args]
    kwargs = [(name, _value(arg, placed)) for name, arg in call.kwargs]
    return lambda env: ([get(env) for get in args], {name: get(env) for name, get in kwargs})


def _value(value: Any, placed: Env) -> Callable[[Env], Any]:
    if isinstance(value, Ref):
        name = value.name
        if name in placed:
            found = placed[name]
            return lambda env: found
        return lambda env: env[name]
    if isinstance(value, list | tuple):
        parts, kind = [_value(part, placed) for part in value], list if isinstance(value, list) else tuple
        return lambda env: kind(get(env) for get in parts)
    return lambda env: value
