"""`compile(module, example_inputs)`: a module in, the same function as one fused plan out."""

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from horsepower.graph import passes, repeats
from horsepower.graph.capture import capture
from horsepower.graph.code import UnkeyedError
from horsepower.graph.key import key_of
from horsepower.graph.plan import Plan, plan_of
from horsepower.kernels.target import check_target, target_of
from horsepower.quant.quantised import Values
from horsepower.quant.scheme import Scheme, scheme_of
from horsepower.runtime.cache import find, keep
from horsepower.runtime.devices import indexed
from horsepower.runtime.executor import Around, Executor, weights_of

_log = logging.getLogger("horsepower")


class Compiled:
    """An immutable snapshot of a module: called like it, with the contract of `plan`.

    Parameters changed in place or attributes changed after compiling raise RuntimeError at the next call.
    """

    def __init__(self, module: nn.Module, plan: Plan, found: bool, seconds: float, weights: Values | None = None):
        """weights: in the place of the module's own; the module may then be on the meta device."""
        self.plan = plan
        self.found = found  # on disk, so that nothing was traced
        self.seconds = seconds  # to compile
        self._run = Executor(plan, weights_of(module) if weights is None else weights)
        self._snapshot = Snapshot(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result. Raises ValueError for inputs that break the contract."""
        self._snapshot.check()
        return self._run(*args, **kwargs)

    def watched(self, around: Around) -> "Compiled":
        """As `Executor.watched`: a twin for profiles."""
        twin = copy.copy(self)
        twin._run = self._run.watched(around)
        return twin

    @property
    def arena_bytes(self) -> int:
        """Memory that is held between calls, for the largest sizes so far."""
        return self._run.arena_bytes

    def drop_arenas(self) -> None:
        """As `Executor.drop_arenas`: the next call takes memory anew."""
        self._run.drop_arenas()

    def to(self, device: torch.device) -> "Compiled":
        """As `Executor.to`: what was made of the weights goes to a device; the module stays where it is."""
        self._run.to(device)
        return self

    def peak(self, *args: Any, **kwargs: Any) -> int:
        """Bytes of activations for inputs of these sizes; weights, inputs and outputs apart. Raises as a call does."""
        return self.plan.at(self.plan.contract.check(args, kwargs)[1]).peak


class Snapshot:
    """What a module was when it was compiled, cheap to compare with what it is now.

    Values changed in place through `.data`, and objects inside the objects that attributes hold, are not seen.
    """

    def __init__(self, module: nn.Module):
        modules = list(module.named_modules())
        self._tensors = [
            (f"{path}.{name}".lstrip("."), holder, name, tensor, _state(tensor))
            for path, each in modules
            for holder in (each._parameters, each._buffers, vars(each))
            for name, tensor in holder.items()
            if tensor is None or isinstance(tensor, Tensor)
        ]
        self._children = [(each._modules, dict(each._modules)) for _, each in modules]
        self._hooks = [(hooks, dict(hooks)) for _, each in modules for hooks in _hooks(each)]
        self._attributes = [
            (path, vars(each), len(vars(each)), [(n, x) for n, x in repeats.attributes(each) if not _is_tensor(x)])
            for path, each in modules
        ]
        values = [value for *_, then in self._attributes for _, value in then]
        self._texts = [(value, repeats.text(value)) for value in values if _is_mutable(value)]
        objects = {id(value): value for value in values if _is_object(value)}
        self._objects = [(vars(x), dict(vars(x))) for x in objects.values()]

    def check(self) -> None:
        """Raises RuntimeError naming the parameter, buffer or attribute that changed."""
        for name, holder, key, tensor, state in self._tensors:
            if holder.get(key) is not tensor or _state(tensor) != state:
                raise RuntimeError(f"{name}: changed after compiling, allowed: compile the module again")
        for path, now, count, then in self._attributes:
            for name, value in then:
                found = now.get(name, _MISSING)
                if found is not value and (type(found) is not type(value) or found != value):
                    raise RuntimeError(
                        f"{f'{path}.{name}'.lstrip('.')}: changed after compiling, allowed: compile it again"
                    )
            if len(now) != count:
                raise RuntimeError(f"{path or 'module'}: got another attribute after compiling, allowed: compile again")
        if any(now != then for now, then in self._children):
            raise RuntimeError("module: a submodule changed after compiling, allowed: compile it again")
        if any(now != then for now, then in self._hooks):
            raise RuntimeError("module: a hook changed after compiling, allowed: compile it again")
        texts = ((repeats.text(value), then) for value, then in self._texts)
        if any(now != then for now, then in (*self._objects, *texts)):
            raise RuntimeError("module: an attribute changed after compiling, allowed: compile it again")


_MISSING = object()


def _state(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """What differs once a tensor's values have been changed or replaced; tensors of inference mode count no changes."""
    if tensor is None:
        return None
    return None if tensor.is_inference() else tensor._version, tensor.dtype, tensor.data_ptr()


def _hooks(module: nn.Module) -> tuple[Any, Any]:
    return module._forward_hooks, module._forward_pre_hooks


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_mutable(value: Any) -> bool:
    return isinstance(value, list | dict | set) or (isinstance(value, tuple) and any(map(_is_mutable, value)))


def _is_object(value: Any) -> bool:
    """Whether it has attributes of its own that can be compared, such as a configuration."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, type | nn.Module | dict)
        and not callable(value)
        and not any(map(_is_tensor, vars(value).values()))
    )


def compile(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    example_keywords: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    expect: Mapping[str, int] | None = None,
    method: str = "forward",
    only: Sequence[passes.Pass] = passes.PASSES,
    cache: bool = True,
    target: str | None = None,
    device: torch.device | str | None = None,
    weights: Values | None = None,
    scheme: str | Scheme | None = None,
) -> Compiled:
    """Capture `module.method`, fuse what can be fused, and plan it; or find the plan that was made before.

    example_inputs: positional arguments; only shapes and dtypes matter. Sizes of dynamic dimensions should be distinct
    and at least 2.
    dynamic_shapes: as for `torch.export.export`; sizes that it leaves out are fixed. A call whose sizes make the
    code take another way than in the trace is refused. Strides are free; code that asks for them sees the example's.
    expect: sites that each pass must take, by the name of the pass.
    only: the passes to run, in order; fewer of them show what each gains.
    target: "cpu", "sm_80" or "sm_90", for a plan to look at; None takes the device that it runs on.
    device: where the plan runs, and its inputs lie; None takes the device that the module and the examples lie on.
    weights: parameters and buffers by name, for a module on the meta device. Each is asked for once, brought to the
    device, and dropped as soon as what is made of it is there. What the scheme quantises may come as `Quantised`.
    scheme: of eight bits, "fp8" or "fp8-weights", or one of your own; it changes numbers, see `horsepower quantize`.
    cache: look for the plan on disk (`runtime/cache.py`), and keep it there; nothing is traced if it is found.
    Raises CaptureError for code that cannot be one graph, and ValueError if a fusion that is expected does not happen.
    """
    start = time.perf_counter()
    plan, found = planned(
        module, example_inputs, example_keywords, dynamic_shapes, expect, method, only, cache, target, device, scheme
    )
    return Compiled(module, plan, found, time.perf_counter() - start, weights)


def planned(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    example_keywords: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    expect: Mapping[str, int] | None = None,
    method: str = "forward",
    only: Sequence[passes.Pass] = passes.PASSES,
    cache: bool = True,
    target: str | None = None,
    device: torch.device | str | None = None,
    scheme: str | Scheme | None = None,
) -> tuple[Plan, bool]:
    """The plan alone, which needs no weights, and whether it was found on disk; arguments are those of `compile`."""
    inputs = (example_inputs, dict(example_keywords or {}))
    here = device_of(module, example_inputs)
    there = here if device is None else indexed(torch.device(device))
    target = target_of(there) if target is None else check_target(target)
    chosen = planned_scheme(scheme, target)
    key = _key(module, *inputs, dynamic_shapes, method, only, target, chosen) if cache else None
    plan = find(key, pytree.tree_structure(inputs)) if key else None
    found = plan is not None
    if plan is None:
        graph = replace(capture(module, *inputs, dynamic_shapes, method), target=target, scheme=chosen)
        plan = plan_of(passes.run(graph, only))
        if key:
            keep(key, plan)
    _require(plan, expect or {})
    return plan if device is None else plan.on(there), found


def planned_scheme(scheme: str | Scheme | None, target: str) -> Scheme | None:
    """Of a plan for a target. Raises ValueError for one that cannot be computed there, or not by plans."""
    chosen = scheme_of(scheme)
    if chosen is not None and chosen.check(target).recipe:
        raise ValueError(f"scheme: got {chosen.name}, which no plan has, allowed: with an Engine in mode eager")
    return chosen


def device_of(module: nn.Module, inputs: Any) -> torch.device:
    """Where the module lies; without parameters, where its inputs do."""
    tensors = (*module.parameters(), *(x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)))
    return next((x.device for x in tensors), torch.device("cpu"))


def _key(*decisive: Any) -> str | None:
    try:
        return key_of(*decisive)
    except UnkeyedError as error:
        _log.info("the plan is neither looked for nor kept: %s", error)
        return None


def _require(plan: Plan, expect: Mapping[str, int]) -> None:
    for rewrite, count in expect.items():
        sites = [site for site in plan.sites if site.rewrite == rewrite]
        taken = sum(site.refused is None for site in sites)
        if taken != count:
            refused = "; ".join(f"{site.module}: {site.refused}" for site in sites if site.refused)
            raise ValueError(f"expect: got {taken} sites of {rewrite}, allowed: {count}. Refused: {refused or 'none'}")
