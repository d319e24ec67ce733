"""The bridge to Transformer Engine beside a stand-in for it, which checks what the package would ask for."""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from horsepower.quant import transformer_engine
from horsepower.quant.scheme import TE, TE_BLOCK
from horsepower.runtime.engine import Engine
from horsepower.runtime.executor import weights_of
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit import Linear as DiTLinear
from horsepower.runtime.source import te_dit
from models import TINY, random_inputs, random_model


class Recipe:
    pass


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


@pytest.fixture
def te(monkeypatch):
    """As much of the package as is used; its layers multiply in 16 bits."""
    inside = SimpleNamespace(recipe=None, made=[])

    @contextmanager
    def context(enabled, recipe):
        assert enabled
        inside.recipe, before = recipe, inside.recipe
        yield
        inside.recipe = before

    class Linear(nn.Module):
        def __init__(self, inputs, outputs, bias, params_dtype, device):
            super().__init__()
            assert inside.recipe is not None, "weights of eight bits alone"
            assert not bias
            assert inputs % 16 == outputs % 16 == 0
            self.weight = nn.Parameter(torch.full((outputs, inputs), torch.nan, dtype=params_dtype, device=device))
            inside.made.append(type(inside.recipe).__name__)

        def forward(self, x):
            assert inside.recipe is not None, "within autocast"
            assert x.shape[0] % 16 == 0
            assert not self.training or inside.training
            return nn.functional.linear(x, self.weight)

    package, pytorch, common = (ModuleType(name) for name in ("te", "te.pytorch", "te.common"))
    pytorch.autocast = pytorch.quantized_model_init = context
    pytorch.Linear = Linear
    recipes = {"Float8CurrentScaling": Float8CurrentScaling, "Float8BlockScaling": Float8BlockScaling}
    common.recipe = SimpleNamespace(**recipes)
    package.pytorch = pytorch
    for name, module in (("", package), (".pytorch", pytorch), (".common", common)):
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    inside.pytorch, inside.training = pytorch, False
    return inside


class Source:
    """Weights of a model that is there."""

    def __init__(self, model):
        self.model = model

    def config(self, name):
        return self.model.config

    def weights(self, name):
        return weights_of(self.model)


@pytest.mark.parametrize("scheme", [TE, TE_BLOCK.keeping(["block.layers.1.*"])], ids=["te", "te-block"])
def test_every_layer_that_is_not_kept_is_the_library_s(te, scheme):
    """Experts, odd token counts, an empty modality; widths that are no multiple of 16."""
    model = random_model(TINY)
    twin = te_dit(Source(model), "distill", torch.device("cpu"), torch.bfloat16, scheme)
    kept = 4 if scheme.keep else 0
    left = [path for path, each in twin.named_modules() if type(each) is DiTLinear]
    assert left == [f"block.layers.1.{each}" for each in (
        "attention.linear_qkv", "attention.linear_proj", "mlp.up_gate_proj", "mlp.down_proj")][:kept]  # fmt: skip
    assert set(te.made) == {transformer_engine.RECIPES[scheme.recipe]}
    assert len(te.made) == 2 * 4 * 3 + (0 if kept else 4)
    for audio in (5, 0):
        given = (*random_inputs(TINY, 3, 3, audio, 4), 3)
        with torch.no_grad():
            for one, other in zip(twin(*given), model(*given), strict=True):
                torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_scales_are_learned_while_calibrating_alone(te):
    twin = te_dit(Source(random_model(TINY)), "distill", torch.device("cpu"), torch.bfloat16, TE)
    te.training = True
    layers = [each for each in twin.modules() if isinstance(each, te.pytorch.Linear)]
    with transformer_engine.calibrating(twin):
        assert all(layer.training for layer in layers)
    assert not any(layer.training for layer in layers)
    with pytest.raises(RuntimeError, match="stop"), transformer_engine.calibrating(twin):
        raise RuntimeError("stop")
    assert not any(layer.training for layer in layers)


def test_a_package_that_is_too_old(te):
    del te.pytorch.quantized_model_init
    with pytest.raises(ValueError, match=r"scheme: got te, allowed: Transformer Engine 2\.20 or newer"):
        transformer_engine.library()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    model = DiT(TINY, device="meta")
    with pytest.raises(ValueError, match="scheme: got te, allowed: where Transformer Engine is installed"):
        transformer_engine.convert(model, DiTLinear, lambda path: None, TE)
    assert sum(isinstance(each, DiTLinear) for each in model.modules()) == 12  # nothing was replaced


@pytest.mark.parametrize(
    ("scheme", "mode", "message"),
    [
        ("te", None, "scheme: got te for cpu, which cannot compute it, allowed: fp8-weights"),
        ("te", "fused", "scheme: got te with mode fused, allowed: with mode eager"),
        ("fp8-weights", "eager", "scheme: got fp8-weights with mode eager, allowed: with mode fused"),
        ("fp8", None, "scheme: got fp8 for cpu, which cannot compute it"),
        ("int8", None, "scheme: got 'int8', allowed: fp8, "),
    ],
)
def test_what_an_engine_refuses(scheme, mode, message):
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained("foal", device="cpu", mode=mode, scheme=scheme)
    with pytest.raises(ValueError, match=r"scheme: got fp8-weights with torch\.float32, allowed: with torch\.bfloat16"):
        Engine.from_pretrained("foal", device="cpu", dtype=torch.float32, scheme="fp8-weights")
