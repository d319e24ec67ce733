"""The memory that code uses, counted in two ways that know nothing of each other: op by op, and by the allocator."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def live_peak(run: Callable[[], object]) -> int:
    """The most bytes that storages made during `run()` held at one time.

    Views share a storage and count it once; an op that returns memory of its inputs makes nothing, and what was alive
    before does not count, and neither does the meta device. Scratch memory inside one operator of torch is not seen;
    `run` is watched in the calling thread alone. Not for what torch.compile made: under a dispatch mode it runs eager,
    and stays so afterwards.
    """
    watch = _Watch()
    with watch:
        run()
    return watch.peak


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes allocated at one time during `run()`, scratch memory and compiled code included.

    From the trace of torch's CPU allocator. Rounding and small scalars of eager operators count too.
    """
    with profile(profile_memory=True) as trace:
        run()
    events = [event for event in trace.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


class _Watch(TorchDispatchMode):
    """Keeps the bytes of every storage that an operator made, until it dies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak, self._total = 0, 0
        self._made: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}  # by id, while it lives

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs or {})
        for storage in _storages(result):
            key = id(storage)
            if key in self._made:
                self._forget(key)  # it may have been resized
            elif key in given:
                continue
            size = storage.nbytes()
            self._made[key] = weakref.ref(storage, partial(self._forget, key)), size
            self._total += size
        self.peak = max(self.peak, self._total)
        return result

    def _forget(self, key: int, _: object = None) -> None:
        self._total -= self._made.pop(key)[1]


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and not x.is_meta]
