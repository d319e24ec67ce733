"""The fused DiT in the place of the eager one."""

from dataclasses import replace

import pytest
import torch

from horsepower.runtime import fused
from horsepower.runtime.engine import Engine
from horsepower.runtime.fused import FusedDiT, expected_fusions
from horsepower.runtime.request import Request
from models import TINY, VARIANTS, random_inputs, random_model, variant
from recordings import relative_error


@pytest.mark.parametrize("name", VARIANTS)
def test_one_plan_serves_all_lengths(name):
    model = random_model(variant(name))
    run = FusedDiT(model)
    for frames, tokens, audio, text in [(3, 4, 5, 6), (1, 1, 1, 0), (4, 30, 21, 17), (2, 2, 0, 3)]:
        *parts, coords = random_inputs(model.config, frames, tokens, audio, text)
        with torch.no_grad():
            condition = run.condition(parts[2], coords)
            got, want = (each.velocity(*parts[:2], condition, frames) for each in (run, model))
        for a, b in zip(got, want, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert not a.numel() or relative_error(a, b) < (0.03 if a.numel() > 100 else 0.15)  # a row is a lottery


def test_a_model_of_one_layer_and_of_float32_products():
    config = replace(TINY, num_layers=1, mm_layers=(), gelu7_layers=())
    model = random_model(config, torch.float32)
    *parts, coords = random_inputs(config, 2, 3, 4, 5)
    with torch.no_grad():
        condition = model.condition(parts[2], coords)
        got, want = (each.velocity(*parts[:2], condition, 2) for each in (FusedDiT(model), model))
    assert expected_fusions(config)["fuse_add_norm"] == 1
    assert max(map(relative_error, got, want)) < 1e-5


def test_strict_is_said_out_loud(monkeypatch):
    model = random_model(replace(TINY, num_layers=1, mm_layers=(), gelu7_layers=()))
    monkeypatch.setattr(fused, "expected_fusions", lambda config: {"fuse_qkv": 2})
    with pytest.raises(ValueError, match="expect: got 1 sites of fuse_qkv, allowed: 2"):
        FusedDiT(model)
    assert FusedDiT(model, strict=False).compiled.plan.sites
    with pytest.raises(ValueError, match="expect: got"):
        Engine.from_pretrained("foal")
    assert Engine.from_pretrained("foal", strict=False).mode == "fused"


def test_the_engine_is_fused_where_there_are_kernels():
    request = Request(prompt="a horse", duration=0.2, resolution=(64, 64), num_inference_steps=2)
    engine, eager = Engine.from_pretrained("foal"), Engine.from_pretrained("foal", mode="eager")
    assert (engine.mode, eager.mode) == ("fused", "eager")
    assert isinstance(engine._dit("distill"), FusedDiT)
    got, want = engine.run(request), eager.run(request)
    assert got.video.shape == want.video.shape
    assert float((got.video.float() - want.video.float()).abs().mean()) < 4  # of 255
