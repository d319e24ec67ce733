"""Plan + weights + inputs -> outputs. Holds no state of a run, so that several threads may run one plan."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from horsepower.graph.plan import Call, Plan, Ref, operator_of

Env = dict[str, Any]


class Executor:
    """A plan with its weights. What depends on weights alone is computed here, once."""

    def __init__(self, plan: Plan, weights: Mapping[str, Tensor]):
        """`weights`: every parameter and buffer by name. Raises ValueError for a missing one."""
        self.plan = plan
        known = {**weights, **plan.constants}
        if missing := [name for _, name in plan.weights if name not in known]:
            raise ValueError(f"weights: {missing[0]} is missing, and {len(missing) - 1} more")
        self._fixed: Env = {value: known[name] for value, name in plan.weights}
        with torch.no_grad():
            for step in map(_bound, plan.loads):
                step(self._fixed)
        used = {ref for call in plan.calls for ref in _refs((call.args, call.kwargs))} | set(_refs(plan.outputs))
        self._fixed = {name: value for name, value in self._fixed.items() if name in used}
        self._steps = tuple(map(_bound, plan.calls))
        self._own = {x.untyped_storage().data_ptr() for x in self._fixed.values() if isinstance(x, Tensor)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Check the inputs, run the calls. Outputs share memory with nothing that the plan holds or was given.

        Raises ValueError for inputs that break the contract.
        """
        given = self.plan.contract.check(args, kwargs)
        env = dict(self._fixed)
        env.update((name, value) for name, value in zip(self.plan.inputs, given, strict=True) if name)
        with torch.no_grad():
            for step in self._steps:
                step(env)
        foreign = self._own | {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
        flat = [env[value.name] if isinstance(value, Ref) else value for value in self.plan.outputs]
        return pytree.tree_unflatten([_owned(value, foreign) for value in flat], self.plan.out_spec)


def _bound(call: Call) -> Callable[[Env], None]:
    """A call with its operator looked up."""
    run, result, frees = operator_of(call.target), call.result, call.frees
    args, kwargs = _reader(call.args), dict(call.kwargs)

    def step(env: Env) -> None:
        env[result] = run(*args(env), **kwargs)
        for name in frees:
            del env[name]

    if any(True for _ in _refs(kwargs)):
        named = {name: _reader(value) for name, value in kwargs.items()}

        def step_named(env: Env) -> None:
            env[result] = run(*args(env), **{name: read(env) for name, read in named.items()})
            for name in frees:
                del env[name]

        return step_named
    return step


def _reader(value: Any) -> Callable[[Env], Any]:
    """How to get an argument out of the values made so far."""
    if isinstance(value, Ref):
        return lambda env: env[value.name]
    if isinstance(value, list | tuple) and any(True for _ in _refs(value)):
        parts, kind = [_reader(part) for part in value], list if isinstance(value, list) else tuple
        return lambda env: kind(read(env) for read in parts)
    return lambda env: value


def _refs(value: Any) -> Any:
    """Names of all values in an argument."""
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _refs(part)
    elif isinstance(value, dict):
        yield from _refs(list(value.values()))


def _owned(value: Any, foreign: set[int]) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in foreign else value
