"""A clip in eight bits: from the engine's door to its notes, and plans of schemes on disk."""

from dataclasses import replace

import pytest
import torch

from horsepower import Engine, Request
from horsepower.graph.passes import PASSES
from horsepower.quant.scheme import FP8, FP8_WEIGHTS
from horsepower.runtime import cache
from horsepower.runtime.compiled import compile, planned
from models import DYNAMIC, TINY, random_inputs, random_model
from recordings import relative_error

REQUEST = Request(prompt="a horse", duration=0.2, resolution=(64, 32), num_inference_steps=2)
WHOLE = [each for each in PASSES if each.__name__ != "lower"]


def test_a_clip_is_made_of_eight_bit_weights():
    """Half the bytes, nearly the same clip, the same bits each time, and its notes say so."""
    plain, small = (Engine.from_pretrained("foal", device="cpu", scheme=scheme) for scheme in (None, "fp8-weights"))
    first, again, other = small.run(REQUEST), small.run(REQUEST), plain.run(REQUEST)
    assert torch.equal(first.video, again.video)
    assert torch.equal(first.audio, again.audio)
    assert not torch.equal(first.video, other.video)
    assert relative_error(first.video.double(), other.video.double()) < 0.05
    assert "scheme: fp8-weights, e4m3 weights by output channel, 16-bit products" in first.notes
    half, whole = (engine._dit("distill").compiled.plan.weight_bytes for engine in (small, plain))
    assert half < 0.52 * whole


def test_a_plan_is_found_under_its_scheme_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.FOLDER, str(tmp_path))
    model, example = random_model(replace(TINY, hidden_size=128, head_dim=32)), (*random_inputs(TINY, 3, 2, 5, 4), 3)

    def plan(chosen):
        return planned(model, example, None, DYNAMIC, None, "forward", WHOLE, target="sm_90", scheme=chosen)

    (first, found), (second, again) = plan(FP8), plan("fp8")
    assert (found, again) == (False, True)
    assert str(first) == str(second)
    assert first.sites == second.sites
    for other in (FP8_WEIGHTS, FP8.keeping(["block.layers.0.*"])):
        text, known = plan(other)
        assert not known
        assert str(text) != str(first)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused_while_they_are_quantised(value):
    model = random_model(TINY)
    model.block.layers[1].mlp.down_proj.weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"block\.layers\.1\.mlp\.down_proj\.weight: got NaN or infinite values"):
        compile(model, (*random_inputs(TINY, 3, 2, 5, 4), 3), dynamic_shapes=DYNAMIC, scheme="fp8-weights")
