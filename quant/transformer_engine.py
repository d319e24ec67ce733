"""Transformer Engine's linear layers in the place of a model's own: eight bits by its recipes, on Hopper.

An optional package, imported when it is asked for. Weights are held in eight bits alone. A recipe that learns its
scales from what it sees does so while `calibrating`; afterwards they stay: nothing of one request shows in another.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horsepower.quant.scheme import Scheme

RECIPES = {"current": "Float8CurrentScaling", "block": "Float8BlockScaling", "delayed": "DelayedScaling"}
MULTIPLE = 16  # of rows and columns


def library() -> Any:
    """The package. Raises ValueError if it is not there, or too old."""
    try:
        import transformer_engine.pytorch as te  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(f"scheme: got te, allowed: where Transformer Engine is installed; {error}") from error
    if not hasattr(te, "autocast") or not hasattr(te, "quantized_model_init"):
        raise ValueError("scheme: got te, allowed: Transformer Engine 2.20 or newer")
    return te


def recipe_of(scheme: Scheme) -> Any:
    """The recipe of a scheme. Raises ValueError as `library`."""
    library()
    from transformer_engine.common import recipe  # type: ignore[import-not-found]

    assert scheme.recipe is not None
    return getattr(recipe, RECIPES[scheme.recipe])()


class Linear(nn.Module):
    """A projection without bias, of one expert or of one for each modality; 16-bit rows in and out.

    Rows and columns are padded with zeros to what the library asks for.
    """

    def __init__(self, weight: Tensor, experts: int, recipe: Any):
        """weight [experts * O, I], bfloat16, on the device to run on."""
        super().__init__()
        te = library()
        self._te, self._recipe = te, recipe
        rows, self._inputs = weight.shape
        self._outputs = rows // experts
        inputs, outputs = self._inputs + -self._inputs % MULTIPLE, self._outputs + -self._outputs % MULTIPLE
        with te.quantized_model_init(enabled=True, recipe=recipe):
            self.parts = nn.ModuleList(
                te.Linear(inputs, outputs, bias=False, params_dtype=weight.dtype, device=weight.device)
                for _ in range(experts)
            )
        with torch.no_grad():
            for part, own in zip(self.parts, weight.chunk(experts), strict=True):
                padded = F.pad(own, (0, inputs - self._inputs, 0, outputs - self._outputs))
                part.get_parameter("weight").copy_(padded)

    @property
    def weight(self) -> Tensor:
        """Whose dtype says what the rows have."""
        return self.parts[0].get_parameter("weight")

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """[L, I] -> [L, O]; `counts`: rows of each modality."""
        rows = x.split(list(counts)) if len(self.parts) > 1 else (x,)
        with self._te.autocast(enabled=True, recipe=self._recipe):
            made = [self._product(part, own) for part, own in zip(self.parts, rows, strict=True)]
        return torch.cat(made) if len(made) > 1 else made[0]

    def _product(self, part: nn.Module, x: Tensor) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self._outputs)
        padded = F.pad(x, (0, -self._inputs % MULTIPLE, 0, -x.shape[0] % MULTIPLE))
        y: Tensor = part(padded)
        return y[: x.shape[0], : self._outputs]


def convert(module: nn.Module, kind: type[nn.Module], weight: Any, scheme: Scheme) -> list[str]:
    """Replace every submodule of a kind, which has `weight` and `experts`, but for those that the scheme keeps.

    weight: gives a layer's weight, on the device to run on, by the layer's path. Returns the paths of those replaced.
    Raises ValueError as `library`.
    """
    recipe = recipe_of(scheme)
    layers = [(path, each) for path, each in module.named_modules() if isinstance(each, kind)]
    taken = [(path, each) for path, each in layers if not scheme.keeps(path)]
    for path, layer in taken:
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, Linear(weight(path), int(layer.experts), recipe).eval())  # type: ignore[arg-type]
    return [path for path, _ in taken]


@contextmanager
def calibrating(module: nn.Module) -> Iterator[None]:
    """Let recipes with a history learn their scales from what runs inside; afterwards these stay as they are."""
    layers = [each for each in module.modules() if isinstance(each, Linear)]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()
