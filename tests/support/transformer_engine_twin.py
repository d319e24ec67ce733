"""A stand-in for Transformer Engine, as much of it as is used; it checks what the package would ask for."""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch
from torch import nn


class Recipe:
    def __init__(self, **settings):
        self.settings = settings


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class DelayedScaling(Recipe):
    pass


class Inside:
    """What the stand-in knows of itself."""

    def __init__(self):
        self.recipe = self.recipe_of_weights = None
        self.made = []
        self.training = []  # layers that ran in that mode: whose scales move when the outermost autocast is left

    @contextmanager
    def autocast(self, enabled, recipe):
        assert enabled
        before, self.recipe = self.recipe, recipe
        try:
            yield
        finally:
            self.recipe = before
            if before is None and torch.is_grad_enabled():
                for layer in dict.fromkeys(self.training):
                    layer.scales = [448 / (largest * 2 ** recipe.settings["margin"]) for largest in layer.largest]
                    layer.moves += 1

    @contextmanager
    def quantized_model_init(self, enabled, recipe):
        assert enabled
        assert self.recipe_of_weights is None
        self.recipe_of_weights = recipe
        yield
        self.recipe_of_weights = None


def in_eight_bits(x, scale):
    return ((x.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale).to(x.dtype)


def layer_of(inside):
    class Linear(nn.Module):
        """Delayed scaling rounds as the package does, by scales that move or not; others multiply in 16 bits."""

        def __init__(self, inputs, outputs, bias, params_dtype, device):
            super().__init__()
            assert not bias
            multiple = 128 if isinstance(inside.recipe_of_weights, Float8BlockScaling) else 16
            assert inputs % multiple == outputs % multiple == 0
            assert not torch.is_grad_enabled()  # a weight of eight bits would be held twice
            self.eight = inside.recipe_of_weights is not None
            self.weight = nn.Parameter(torch.full((outputs, inputs), torch.nan, dtype=params_dtype, device=device))
            self.scales, self.largest, self.moves = [1.0, 1.0], [2.0**-60, 2.0**-60], 0  # of inputs, of the weight
            self.ran = 0
            inside.made.append((type(inside.recipe_of_weights).__name__, self))

        def get_extra_state(self):
            return torch.tensor([*self.scales, *self.largest], dtype=torch.float64)

        def set_extra_state(self, state):
            *self.scales, a, b = state.tolist()
            self.largest = [a, b]

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            if self.eight and (state := state_dict.get(f"{prefix}_extra_state")) is not None:
                self.set_extra_state(state)
            super()._load_from_state_dict(state_dict, prefix, *rest)
            if self.eight and state is not None:
                self.weight.data = in_eight_bits(self.weight, self.scales[1])

        def forward(self, x):
            assert inside.recipe is not None, "within autocast"
            assert x.shape[0] % (128 if isinstance(inside.recipe, Float8BlockScaling) else 16) == 0
            assert not (self.training and self.eight), "weights of 16 bits while it learns"
            assert not (torch.is_grad_enabled() and self.weight.requires_grad)
            self.ran += 1
            if not isinstance(inside.recipe, DelayedScaling):
                return nn.functional.linear(x, self.weight)
            if self.training:
                inside.training.append(self)
                pairs = zip(self.largest, (x, self.weight), strict=True)
                self.largest = [max(old, float(new.abs().max())) for old, new in pairs]
            weight = self.weight if self.eight else in_eight_bits(self.weight, self.scales[1])
            return nn.functional.linear(in_eight_bits(x, self.scales[0]), weight)

    return Linear


def install(monkeypatch):
    """Let the stand-in be what is imported; returns what it knows."""
    inside = Inside()
    package, pytorch, common = (ModuleType(name) for name in ("te", "te.pytorch", "te.common"))
    pytorch.autocast, pytorch.quantized_model_init = inside.autocast, inside.quantized_model_init
    pytorch.Linear = layer_of(inside)
    recipes = (Float8CurrentScaling, Float8BlockScaling, DelayedScaling)
    common.recipe = SimpleNamespace(**{recipe.__name__: recipe for recipe in recipes})
    package.pytorch = pytorch
    for name, module in (("", package), (".pytorch", pytorch), (".common", common)):
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    inside.pytorch = pytorch
    return inside
