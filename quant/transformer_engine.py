"""Transformer Engine's linear layers in the place of a model's own: eight bits by its recipes, on Hopper.

An optional package, imported when it is asked for. Weights are held in eight bits alone. A recipe that learns its
scales from what it sees does so in a model that is `learning`, whose weights have 16 bits; what it learned makes one of
eight bits, in which nothing moves: nothing of one request shows in another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horsepower.quant.scheme import Scheme

RECIPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "current": ("Float8CurrentScaling", {}),
    "block": ("Float8BlockScaling", {}),
    # Room for twice what was seen: later inputs are others, and nothing moves then (`runtime/calibration.py`).
    "delayed": ("DelayedScaling", {"margin": 1}),
}
MULTIPLES = {"current": 16, "block": 128, "delayed": 16}  # of rows and columns

# What the layers of a model learned, as the library gives it: of each layer by its path, of each of its experts.
Learned: TypeAlias = Mapping[str, Sequence[Tensor]]


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
    name, settings = RECIPES[scheme.recipe]
    return getattr(recipe, name)(**settings)


@contextmanager
def running(recipe: Any, learning: bool = False) -> Iterator[None]:
    """A step of a model. The library moves scales when it is left, once for all layers, of those that are learning."""
    # It looks whether gradients are on when it does so; of weights that ask for none nothing is kept for them.
    with torch.set_grad_enabled(learning), library().autocast(enabled=True, recipe=recipe):
        yield


class Linear(nn.Module):
    """A projection without bias, of one expert or of one for each modality; 16-bit rows in and out, while `running`.

    Rows and columns are padded with zeros to what the library asks for.
    """

    @torch.no_grad()  # with gradients a weight would be held transposed as well
    def __init__(
        self,
        weight: Tensor,
        experts: int,
        recipe: Any,
        multiple: int,
        learned: Sequence[Tensor] | None = None,
        learning: bool = False,
    ):
        """weight [experts * O, I], bfloat16, on the device to run on; multiple: to which rows and columns are padded.

        learned: by each expert, if the recipe learns.
        """
        super().__init__()
        te = library()
        rows, self._inputs = weight.shape
        self._outputs, self._multiple = rows // experts, multiple
        inputs, outputs = self._inputs + -self._inputs % multiple, self._outputs + -self._outputs % multiple
        with ExitStack() as eight:
            if not learning:
                eight.enter_context(te.quantized_model_init(enabled=True, recipe=recipe))
            self.parts = nn.ModuleList(
                te.Linear(inputs, outputs, bias=False, params_dtype=weight.dtype, device=weight.device)
                for _ in range(experts)
            )
        known: Sequence[Tensor | None] = learned or [None] * experts
        for part, own, scales in zip(self.parts, weight.chunk(experts), known, strict=True):
            padded = F.pad(own, (0, inputs - self._inputs, 0, outputs - self._outputs))
            # Scales with the weight: the library takes them first, and the weight's codes by them.
            given = {"weight": padded} if scales is None else {"weight": padded, "_extra_state": scales}
            missed = part.load_state_dict(given, strict=False)  # a recipe without a history has no such state
            assert "weight" not in missed.missing_keys
        self.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """Whose dtype says what the rows have."""
        return self.parts[0].get_parameter("weight")

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """[L, I] -> [L, O]; `counts`: rows of each modality."""
        rows = x.split(list(counts)) if len(self.parts) > 1 else (x,)
        made = [self._product(part, own) for part, own in zip(self.parts, rows, strict=True)]
        return torch.cat(made) if len(made) > 1 else made[0]

    def _product(self, part: nn.Module, x: Tensor) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self._outputs)
        padded = F.pad(x, (0, -self._inputs % self._multiple, 0, -x.shape[0] % self._multiple))
        y: Tensor = part(padded)
        return y[: x.shape[0], : self._outputs]


def convert(
    module: nn.Module,
    kind: type[nn.Module],
    weight: Callable[[str], Tensor],
    scheme: Scheme,
    learned: Learned | None = None,
    learning: bool = False,
) -> list[str]:
    """Replace every submodule of a kind, which has `weight` and `experts`, but for those that the scheme keeps.

    weight: gives a layer's weight, on the device to run on, by the layer's path. learned: what a twin learned, to begin
    with or, unless it goes on `learning`, to stay with. Returns the paths of those replaced.
    Raises ValueError as `library`.
    """
    assert scheme.recipe is not None
    recipe, multiple = recipe_of(scheme), MULTIPLES[scheme.recipe]
    layers = [(path, each) for path, each in module.named_modules() if isinstance(each, kind)]
    taken = [(path, each) for path, each in layers if not scheme.keeps(path)]
    for path, layer in taken:
        owner, _, name = path.rpartition(".")
        scales = None if learned is None else learned[path]
        made = Linear(weight(path), int(layer.experts), recipe, multiple, scales, learning)  # type: ignore[arg-type]
        setattr(module.get_submodule(owner), name, made)
    module.train(learning)  # whose scales the library moves
    return [path for path, _ in taken]


def learned_by(module: nn.Module) -> Learned:
    """Of a model that is learning, what its layers know by now."""
    layers = [(path, each) for path, each in module.named_modules() if isinstance(each, Linear)]
    return {path: [part.get_extra_state() for part in each.parts] for path, each in layers}
