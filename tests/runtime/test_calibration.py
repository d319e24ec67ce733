"""What is measured of a layer is what its plan computes."""

from dataclasses import replace

import pytest
import torch

from horsepower.graph.passes import PASSES
from horsepower.graph.passes.lower import lower
from horsepower.quant.budget import ProductError
from horsepower.runtime import calibration
from horsepower.runtime.calibration import Calibration
from horsepower.runtime.executor import weights_of
from horsepower.runtime.fused import FusedDiT, plan_velocity
from horsepower.runtime.models.dit import DiT
from models import TINY, VARIANTS, random_inputs, random_model

CONFIG = replace(TINY, hidden_size=128, head_dim=32)
LEAVES = ("attention.linear_qkv", "attention.linear_proj", "mlp.up_gate_proj", "mlp.down_proj")


def measured(model, activations, rows=256, steps=1):
    found = Calibration(model, activations, rows)
    *inputs, coords = random_inputs(model.config, 3, 12, 9, 8)
    with torch.no_grad(), found.watching():
        for _ in range(steps):
            model(*inputs, coords, 3)
    return found.errors


@pytest.mark.parametrize("name", ["default", "post_norm", "per_head"])
@pytest.mark.parametrize("activations", [False, True])
def test_every_layer_of_normal_weights(name, activations):
    model = random_model(replace(CONFIG, **VARIANTS[name]))
    errors = measured(model, activations, steps=2)
    assert list(errors) == [f"block.layers.{i}.{leaf}" for i in range(3) for leaf in LEAVES]
    low, high = (0.033, 0.045) if activations else (0.024, 0.03)
    for found in errors.values():
        assert len(found) == 2  # steps
        assert all(low < each.scheme < high and each.own < 0.004 for each in found)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_sample_is_close_to_all_rows():
    model = random_model(CONFIG)
    few, every = measured(model, True, 16), measured(model, True)
    for layer, (error,) in every.items():
        assert few[layer][0].scheme == pytest.approx(error.scheme, rel=0.15)
        assert few[layer] != every[layer]


def test_inputs_have_the_scales_of_the_plan(monkeypatch):
    model, seen = random_model(CONFIG), []

    def note(rows, weight, experts):
        seen.append(rows)
        return ProductError(0.0, 0.0)

    monkeypatch.setattr(calibration, "product_error", note)
    measured(model, True)
    only = [each for each in PASSES if each is not lower]
    meta = DiT(CONFIG, device="meta")
    plan = plan_velocity(meta, torch.device("cpu"), only=only, scheme="fp8", target="sm_90")
    fixed = FusedDiT(meta, plan=plan, weights=weights_of(model)).compiled._run._fixed
    inverses = [float(fixed[call.result]) for call in plan.loads if call.target == "aten.reciprocal.default"]
    qkv, proj, up, down = (seen[i::4] for i in range(4))
    assert [1 / float(rows.static) for rows in proj] == inverses
    assert [rows.static for rows in down] == [1 / 64, 1 / 8, 1 / 8]  # gelu7, then swiglu7
    assert all(rows.scales is None for rows in (*proj, *down))
    assert all(rows.scales.shape == (53, 1) and rows.static == 1 for rows in (*qkv, *up))
    for rows in seen:
        scales = rows.static if rows.scales is None else rows.scales
        error = (rows.codes.float() * scales - rows.x.float()).norm() / rows.x.float().norm()
        assert 0.02 < error < 0.035
