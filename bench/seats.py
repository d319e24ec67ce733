"""What the rungs of the ladder at full size hold on a device, and who has room there."""

import copy
import gc
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from horsepower.bench.step import Tokens
from horsepower.graph.plan import Plan
from horsepower.quant.scheme import Scheme
from horsepower.quant.transformer_engine import Learned, recipe_of
from horsepower.runtime.checkpoint import fill
from horsepower.runtime.executor import Executor, weights_of
from horsepower.runtime.fused import velocity_sizes
from horsepower.runtime.models.dit import DiT, Linear
from horsepower.runtime.te_dit import TEDiT


class Seat(Protocol):
    """What holds weights on the device between `load` and `drop`."""

    @property
    def bytes(self) -> int:
        """That it holds at the most."""
        ...

    def load(self) -> None: ...

    def drop(self) -> None: ...


class Modules:
    """The model as it is written, and a twin whose layers torch.compile compiles; both have the same weights."""

    def __init__(self, model: DiT, weights: Mapping[str, Tensor], device: torch.device):
        """`model` is on the meta device."""
        self.eager, self.regional = copy.deepcopy(model), copy.deepcopy(model)
        for layer in self.regional.block.layers:
            layer.compile(dynamic=False)
        self._weights, self._device = weights, device
        self.bytes = sum(x.nbytes for x in weights_of(model).values())

    def load(self) -> None:
        values = dict(self._weights)
        for each in (self.eager, self.regional):
            fill(each, values, self._device)

    def drop(self) -> None:
        for each in (self.eager, self.regional):
            each.to("meta")


class Planned:
    """A plan and, at times, its executor."""

    def __init__(self, plan: Plan, weights: Mapping[str, Tensor], tokens: Tokens):
        self._plan, self._weights = plan, weights
        self._run: Executor | None = None
        self.bytes = plan.weight_bytes + plan.at(velocity_sizes(tokens.counts, tokens.frames)).peak

    def load(self) -> None:
        self._run = Executor(self._plan, self._weights)

    def drop(self) -> None:
        self._run = None

    def velocity(self, *inputs: Any) -> Any:
        assert self._run is not None
        return self._run(*inputs)


class TransformerEngine:
    """The model as it is written, with Transformer Engine's linear layers."""

    def __init__(
        self, model: DiT, weights: Mapping[str, Tensor], device: torch.device, scheme: Scheme, inputs: tuple[Any, ...]
    ):
        """`model` is on the meta device; inputs: what scales are learned from, if they are. Raises ValueError."""
        recipe_of(scheme)  # now, before others give way
        self._model: TEDiT | None = None
        self._make = partial(TEDiT, model.config, weights, device, torch.bfloat16, scheme)
        self._inputs, self._learns = inputs, scheme.recipe == "delayed"
        self._learned: Learned | None = None
        self._wide = sum(x.nbytes for x in weights_of(model).values())
        self._eight = sum(each.weight.numel() for each in model.modules() if isinstance(each, Linear))

    @property
    def bytes(self) -> int:
        """While it learns, at its first load, its weights have 16 bits."""
        return self._wide - (0 if self._learns and self._learned is None else self._eight)

    def load(self) -> None:
        if self._learns and self._learned is None:
            self._learned = self._learn(self._make(learning=True))
            gc.collect()
        self._model = self._make(self._learned)

    def _learn(self, model: TEDiT) -> Learned:
        for _ in range(2):  # scales are 1 in the first step
            model.velocity(*self._inputs)
        return model.learned()

    def drop(self) -> None:
        self._model = None

    def velocity(self, *inputs: Any) -> Any:
        assert self._model is not None
        return self._model.velocity(*inputs)


class Pool:
    """The seats that are loaded: as many as memory holds; who sat longest without a turn goes first."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._loaded: list[Seat] = []

    def take(self, seat: Seat, beside: int) -> bool:
        """Load a seat, with `beside` bytes left to run it; False if it was there. Raises ValueError if it cannot be."""
        if (missing := seat.bytes + beside - self._capacity) > 0:
            raise ValueError(
                f"device: got {self._capacity / 2**30:.1f} GiB free, allowed: at least "
                f"{(seat.bytes + beside) / 2**30:.1f}; {missing / 2**30:.1f} GiB are missing"
            )
        there = seat in self._loaded
        if there:
            self._loaded.remove(seat)
        while self._loaded and sum(each.bytes for each in (*self._loaded, seat)) + beside > self._capacity:
            self._drop(self._loaded.pop(0))
        if not there:
            seat.load()
        self._loaded.append(seat)
        return not there

    def beside(self, seat: Seat) -> int:
        """Bytes of the others that are loaded."""
        return sum(each.bytes for each in self._loaded if each is not seat)

    def clear(self) -> None:
        while self._loaded:
            self._drop(self._loaded.pop())

    def _drop(self, seat: Seat) -> None:
        seat.drop()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
