"""The error of each linear layer of a DiT on what it reads in real denoising steps.

The model runs as it is written, in 16 bits. Hooks take a sample of the rows that pass, quantise them as the plan does
(`graph/passes/quantise_in_producer.py`) with the plan's own ops, and measure at once: nothing is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from horsepower.kernels.activation import ACTIVATION, FP8_GAINS
from horsepower.kernels.float8 import E4M3, codes_of
from horsepower.kernels.quantise import QUANTISE
from horsepower.kernels.value_bound import VALUE_BOUND
from horsepower.quant.budget import ProductError, Rows, product_error
from horsepower.quant.sampling import sample
from horsepower.runtime.models.dit import MLP, Attention, Counts, DiT, Linear, gelu7, widen

ROWS = 256  # of a step


class Calibration:
    """Errors of a model's layers, by their paths in it: one for every step that ran while it was `watching`."""

    def __init__(self, model: DiT, activations: bool, rows: int = ROWS, seed: int = 0):
        """activations: whether what layers read is quantised too. rows: sampled in each step."""
        self.errors: dict[str, list[ProductError]] = {}
        self._model, self._activations, self._rows = model, activations, rows
        self._generator = torch.Generator().manual_seed(seed)
        self._at = torch.empty(0, dtype=torch.long)
        self._counts: Counts = (0, 0, 0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure in each step that the model does meanwhile."""
        handles = [self._model.block.register_forward_pre_hook(self._begin)]
        for path, module in self._model.named_modules():
            if isinstance(module, Attention):
                normed = partial(self._normed, f"{path}.linear_qkv", module.linear_qkv)
                attended = partial(self._attended, f"{path}.linear_proj", module)
                handles.append(module.pre_norm.register_forward_hook(normed))
                handles.append(module.linear_proj.register_forward_pre_hook(attended))
            elif isinstance(module, MLP):
                normed = partial(self._normed, f"{path}.up_gate_proj", module.up_gate_proj)
                activated = partial(self._activated, f"{path}.down_proj", module)
                handles.append(module.pre_norm.register_forward_hook(normed))
                handles.append(module.up_gate_proj.register_forward_hook(activated))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        """A step: choose its rows."""
        at, counts = sample(given[2], self._rows, self._generator)
        self._at, self._counts = at.to(given[0].device), (counts[0], counts[1], counts[2])

    def _normed(self, name: str, linear: Linear, _: nn.Module, given: tuple[Any, ...], n: Tensor) -> None:
        """Behind a norm rows are quantised as it computes them, each with its own scale."""
        x = n[self._at]
        self._measure(name, linear, x, *(QUANTISE(x) if self._activations else ()))

    def _activated(self, name: str, mlp: MLP, _: nn.Module, given: tuple[Any, ...], u: Tensor) -> None:
        """Behind an activation there is one scale, from its bounds."""
        u, kind = u[self._at], "gelu7" if mlp.activation is gelu7 else "swiglu7"
        x, static = mlp.activation(widen(u)), 1 / FP8_GAINS[kind]
        codes = ACTIVATION(u, kind, E4M3)[0] if self._activations else None
        self._measure(name, mlp.down_proj, x, codes, None, static)

    def _attended(self, name: str, attention: Attention, _: nn.Module, given: tuple[Any, ...]) -> None:
        """Behind attention there is one scale, from the bound of its values."""
        x = given[0][self._at]
        queries, keys, values, _gate = attention.widths
        codes, scales = QUANTISE(attention.linear_qkv.weight)
        gain = attention.pre_norm.weight + 1
        (bound,) = VALUE_BOUND(codes, scales, gain, attention.experts, queries + keys, values)
        made = codes_of(widen(x), bound.reciprocal()) if self._activations else None
        self._measure(name, attention.linear_proj, x, made, None, bound)

    def _measure(
        self, name: str, linear: Linear, x: Tensor, codes: Tensor | None = None, scales: Tensor | None = None,
        static: Tensor | float = 1.0,
    ) -> None:  # fmt: skip
        rows = Rows(x, self._counts, codes, scales, static)
        self.errors.setdefault(name, []).append(product_error(rows, linear.weight, linear.experts))
