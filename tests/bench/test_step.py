"""Random weights for models of any size, and inputs for them."""

from dataclasses import replace

import pytest
import torch

from horsepower.bench import step
from horsepower.bench.live import live_peak
from horsepower.bench.step import RandomWeights, Tokens
from horsepower.runtime.checkpoint import fill
from horsepower.runtime.fused import conditioner
from horsepower.runtime.models.dit import DiT, FourierRope
from models import TINY, random_model

META = DiT(TINY, device="meta")


def test_a_name_decides_the_values():
    some, others = RandomWeights(META, "cpu"), RandomWeights(DiT(replace(TINY, num_layers=4), device="meta"), "cpu")
    name = "block.layers.2.mlp.down_proj.weight"
    assert torch.equal(some[name], some[name])
    assert torch.equal(some[name], others[name])
    assert not torch.equal(some[name], RandomWeights(META, "cpu", seed=1)[name])
    assert not torch.equal(some[name], some[name.replace("2", "1")][: len(some[name])])


def test_values_fill_the_model_and_keep_the_variance():
    weights = RandomWeights(META, "cpu")
    model = DiT(TINY, device="meta")
    fill(model, weights, "cpu")
    assert {name: (x.shape, x.dtype) for name, x in model.state_dict().items()} == {
        name: (x.shape, x.dtype) for name, x in META.state_dict().items()
    }
    for name, x in model.named_parameters():
        size = 0.1 if x.ndim == 1 else x.shape[1] ** -0.5
        assert float(x.detach().float().std()) == pytest.approx(size, rel=0.5 if x.numel() < 100 else 0.1), name
    assert torch.equal(model.adapter.rope.bands, FourierRope(TINY.head_dim, torch.float32, "cpu").bands)


def test_one_is_there_at_a_time():
    weights = RandomWeights(META, "cpu")
    largest = max(x.nbytes for x in META.state_dict().values())
    assert live_peak(lambda: [weights[name] is None for name in weights]) <= largest + 64


def test_inputs_need_no_more_than_the_condition_reads():
    model, tokens = random_model(TINY), Tokens(12, 5, 4, 2)
    wanted = step.inputs(model, tokens)
    given = step.inputs(conditioner(META, dict(model.state_dict()), "cpu"), tokens)
    for a, b in zip((*wanted[:2], *wanted[2]), (*given[:2], *given[2]), strict=True):
        assert torch.equal(a, b)
    assert given[3] == 2
