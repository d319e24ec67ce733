"""`compile(module, example_inputs)`: a module in, the same function as one fused plan out."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from horsepower.graph import passes, repeats
from horsepower.graph.capture import capture
from horsepower.graph.code import UnkeyedError
from horsepower.graph.key import key_of
from horsepower.graph.plan import Plan, plan_of
from horsepower.runtime.cache import find, keep
from horsepower.runtime.executor import Executor, weights_of

_MUTABLE = (list, dict, set)
_log = logging.getLogger("horsepower")


class Compiled:
    """An immutable snapshot of a module: called like it, with the contract of `plan`.

    Parameters changed in place or attributes changed after compiling raise RuntimeError at the next call.
    """

    def __init__(self, module: nn.Module, plan: Plan, found: bool, seconds: float):
        self.plan = plan
        self.found = found  # on disk, so that nothing was traced
        self.seconds = seconds  # to compile
        self._run = Executor(plan, weights_of(module))
        self._snapshot = Snapshot(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result. Raises ValueError for inputs that break the contract."""
        self._snapshot.check()
        return self._run(*args, **kwargs)

    def peak(self, *args: Any, **kwargs: Any) -> int:
        """Bytes of activations for inputs of these sizes; weights, inputs and outputs apart. Raises as a call does."""
        return self.plan.at(self.plan.contract.check(args, kwargs)[1]).peak


class Snapshot:
    """What a module was when it was compiled, cheap to compare with what it is now."""

    def __init__(self, module: nn.Module):
        modules = list(module.named_modules())
        self._tensors = [
            (f"{path}.{name}".lstrip("."), holder, name, tensor, None if tensor is None else tensor._version)
            for path, each in modules
            for holder in (each._parameters, each._buffers)
            for name, tensor in holder.items()
        ]
        self._children = [(each._modules, dict(each._modules)) for _, each in modules]
        self._attributes = [(each, path, dict(repeats.attributes(each))) for path, each in modules]
        mutable = [each for each, _, then in self._attributes if any(isinstance(x, _MUTABLE) for x in then.values())]
        self._texts = [(each, repeats.attribute_texts(each)) for each in mutable]

    def check(self) -> None:
        """Raises RuntimeError naming the parameter, buffer or attribute that changed."""
        for name, holder, key, tensor, version in self._tensors:
            if holder.get(key) is not tensor or (tensor is not None and tensor._version != version):
                raise RuntimeError(f"{name}: changed after compiling, allowed: compile the module again")
        for each, path, then in self._attributes:
            now = vars(each)
            for name, value in then.items():
                if now.get(name) is not value and now.get(name) != value:
                    raise RuntimeError(
                        f"{f'{path}.{name}'.lstrip('.')}: changed after compiling, allowed: compile it again"
                    )
        if any(now != then for now, then in self._children):
            raise RuntimeError("module: a submodule changed after compiling, allowed: compile it again")
        if any(repeats.attribute_texts(each) != then for each, then in self._texts):
            raise RuntimeError("module: an attribute changed after compiling, allowed: compile it again")


def compile(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    example_keywords: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    expect: Mapping[str, int] | None = None,
    method: str = "forward",
    only: Sequence[passes.Pass] = passes.PASSES,
    cache: bool = True,
) -> Compiled:
    """Capture `module.method`, fuse what can be fused, and plan it; or find the plan that was made before.

    example_inputs: positional arguments; only shapes and dtypes matter. Sizes of dynamic dimensions should be distinct
    and at least 2.
    dynamic_shapes: as for `torch.export.export`; sizes that it leaves out are fixed.
    expect: sites that each pass must take, by the name of the pass.
    only: the passes to run, in order; fewer of them show what each gains.
    cache: look for the plan on disk (`runtime/cache.py`), and keep it there; nothing is traced if it is found.
    Raises CaptureError for code that cannot be one graph, and ValueError if a fusion that is expected does not happen.
    """
    start = time.perf_counter()
    inputs = (example_inputs, dict(example_keywords or {}))
    key = _key(module, *inputs, dynamic_shapes, method, only) if cache else None
    plan = find(key, pytree.tree_structure(inputs)) if key else None
    found = plan is not None
    if plan is None:
        plan = plan_of(passes.run(capture(module, *inputs, dynamic_shapes, method), only))
        if key:
            keep(key, plan)
    _require(plan, expect or {})
    return Compiled(module, plan, found, time.perf_counter() - start)


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
