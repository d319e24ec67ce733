"""The error of each linear layer of a DiT, and of attention, on what it reads in real denoising steps.

The model runs as it is written, in 16 bits. Hooks take a sample of the rows that pass, quantise them as the plan does
(`graph/passes/quantise.py`, `quantise_in_producer.py`) with the plan's own ops, and measure at once: nothing is kept.

Where all inputs of a layer share one frozen scale, their largest value comes first, of all rows of all steps.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from horsepower.kernels.activation import ACTIVATION, FP8_GAINS
from horsepower.kernels.float8 import E4M3, LARGEST, LEAST, codes_of
from horsepower.kernels.head_bound import HEAD_BOUND
from horsepower.kernels.quantise import QUANTISE
from horsepower.kernels.to_codes import TO_CODES
from horsepower.kernels.value_bound import VALUE_BOUND
from horsepower.quant.attention_error import Heads, attention_error
from horsepower.quant.budget import ProductError, Rows, product_error
from horsepower.quant.quantised import quantise
from horsepower.quant.sampling import sample
from horsepower.quant.scheme import Scheme
from horsepower.runtime.models.dit import MLP, Attention, Counts, DiT, Linear, gelu7, rotate, widen

ROWS = 256  # of a step

# Above the largest input that was seen. Other prompts, other sizes and the errors of eight bits themselves make larger
# ones, and what saturates is wrong by all that is cut off, while room above costs next to nothing: codes are floating
# point, so a power of two leaves those of all normal values as they are. Of the 15 octaves below the largest code the
# lowest goes over to the subnormal ones.
MARGIN = 2.0


@contextmanager
def largest_inputs(model: DiT) -> Iterator[dict[str, Tensor]]:
    """The largest magnitude of what each linear layer reads meanwhile, of all rows: [] by the layer's path."""
    found: dict[str, Tensor] = {}

    def see(name: str, _: nn.Module, given: tuple[Any, ...]) -> None:
        largest = torch.linalg.vector_norm(given[0], math.inf).double()  # NaN if one is
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, Linear)]
    handles = [layer.register_forward_pre_hook(partial(see, name)) for name, layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def calibrated(scheme: Scheme, largest: Mapping[str, Tensor]) -> Scheme:
    """The scheme with scales for inputs up to MARGIN times the largest that were seen.

    Raises ValueError for inputs that were not finite.
    """
    return scheme.calibrated({name: max(MARGIN * float(value), LEAST) for name, value in largest.items()})


class Calibration:
    """Errors of a model's layers, by their paths in it: one for every step that ran while it was `watching`."""

    def __init__(self, model: DiT, scheme: Scheme, rows: int = ROWS, seed: int = 0):
        """scheme: calibrated, if it has to be. rows: sampled in each step."""
        self.errors: dict[str, list[ProductError]] = {}
        self._model, self._scheme, self._rows = model, scheme, rows
        self._by_row, self._largest = scheme.inputs == "token", dict(scheme.largest)
        self._generator = torch.Generator().manual_seed(seed)
        self._at = torch.empty(0, dtype=torch.long)
        self._counts: Counts = (0, 0, 0)
        self._rope, self._frames = torch.empty(0), 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure in each step that the model does meanwhile."""
        handles = [self._model.block.register_forward_pre_hook(self._begin)]
        for path, module in self._model.named_modules():
            handles += self._watch(path, module)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, path: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """What sees a module's layers read."""
        if self._scheme.attention and isinstance(module, Attention):
            yield module.register_forward_pre_hook(self._attend)
            yield module.linear_qkv.register_forward_hook(partial(self._attention, path, module))
        if self._scheme.inputs == "tensor":
            if isinstance(module, Linear):
                yield module.register_forward_pre_hook(partial(self._frozen, path))
        elif isinstance(module, Attention):
            normed = partial(self._normed, f"{path}.linear_qkv", module.linear_qkv)
            yield module.pre_norm.register_forward_hook(normed)
            yield module.linear_proj.register_forward_pre_hook(partial(self._attended, f"{path}.linear_proj", module))
        elif isinstance(module, MLP):
            normed = partial(self._normed, f"{path}.up_gate_proj", module.up_gate_proj)
            yield module.pre_norm.register_forward_hook(normed)
            yield module.up_gate_proj.register_forward_hook(partial(self._activated, f"{path}.down_proj", module))

    def _begin(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        """A step: choose its rows."""
        at, counts = sample(given[2], self._rows, self._generator)
        self._at, self._counts = at.to(given[0].device), (counts[0], counts[1], counts[2])

    def _normed(self, name: str, linear: Linear, _: nn.Module, given: tuple[Any, ...], n: Tensor) -> None:
        """Behind a norm rows are quantised as it computes them, each with its own scale."""
        x = n[self._at]
        self._measure(name, linear, x, *(QUANTISE(x) if self._by_row else ()))

    def _activated(self, name: str, mlp: MLP, _: nn.Module, given: tuple[Any, ...], u: Tensor) -> None:
        """Behind an activation there is one scale, from its bounds."""
        u, kind = u[self._at], "gelu7" if mlp.activation is gelu7 else "swiglu7"
        x, static = mlp.activation(widen(u)), 1 / FP8_GAINS[kind]
        codes = ACTIVATION(u, kind, E4M3)[0] if self._by_row else None
        self._measure(name, mlp.down_proj, x, codes, None, static)

    def _attend(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        """Attention begins: it reads (h, rope, counts, frames)."""
        self._rope, self._frames = given[1], given[3]

    def _attention(self, name: str, attention: Attention, _: nn.Module, given: tuple[Any, ...], u: Tensor) -> None:
        """Of attention itself: queries and keys are quantised as they are turned, values as they are projected."""
        counts, norms = given[1], (attention.q_norm, attention.k_norm)
        q, k, v = (x.unflatten(-1, (-1, attention.head_dim)) for x in u.split(attention.widths, dim=-1)[:3])
        q, k = (rotate(norm(widen(x), counts), self._rope) for norm, x in zip(norms, (q, k), strict=True))
        bounds = [HEAD_BOUND(norm.weight + 1, attention.experts)[0] for norm in norms]
        heads = Heads(q, k, v, (bounds[0], bounds[1], self._value_bound(attention)))
        window = attention.window if attention.local else -1
        error = attention_error(heads, u.dtype, self._at, self._frames, counts[0], window)
        self.errors.setdefault(name, []).append(error)

    def _value_bound(self, attention: Attention) -> Tensor:
        queries, keys, values, _gate = attention.widths
        codes, scales = quantise(attention.linear_qkv.weight, self._scales(attention.linear_qkv))
        gain = attention.pre_norm.weight + 1
        return VALUE_BOUND(codes, scales, gain, attention.experts, queries + keys, values)[0]

    def _attended(self, name: str, attention: Attention, _: nn.Module, given: tuple[Any, ...]) -> None:
        """Behind attention there is one scale, from the bound of its values."""
        x, bound = given[0][self._at], self._value_bound(attention)
        made = codes_of(widen(x), bound.reciprocal()) if self._by_row else None
        self._measure(name, attention.linear_proj, x, made, None, bound)

    def _frozen(self, name: str, linear: nn.Module, given: tuple[Any, ...]) -> None:
        """With one scale for all rows of all steps."""
        assert isinstance(linear, Linear)
        x, inverse = given[0][self._at], LARGEST / self._largest[name]
        self._measure(name, linear, x, TO_CODES(x, inverse)[0], None, 1 / inverse)

    def _scales(self, linear: Linear) -> int:
        """Of its weight."""
        return linear.experts if self._scheme.weights == "tensor" else len(linear.weight)

    def _measure(
        self, name: str, linear: Linear, x: Tensor, codes: Tensor | None = None, scales: Tensor | None = None,
        static: Tensor | float = 1.0,
    ) -> None:  # fmt: skip
        rows = Rows(x, self._counts, codes, scales, static)
        error = product_error(rows, linear.weight, linear.experts, self._scales(linear))
        self.errors.setdefault(name, []).append(error)
