"""The passes: every site of the model family is taken, each stage computes the model, and what differs is refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from horsepower.graph import passes
from horsepower.graph.capture import capture
from horsepower.graph.spec import SpecError, check
from horsepower.runtime.executor import weights_of
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.presets import FOAL
from models import DYNAMIC, VARIANTS, random_inputs, random_model, variant
from recordings import relative_error

EVERY_LAYER = {"post_norm": {"post_norm_layers": tuple(range(40))}}


@pytest.mark.parametrize(
    ("name", "target"),
    [*((name, "cpu") for name in ("default", "windowed", "post_norm", "per_head", "no_gate")), ("default", "sm_90")],
)
def test_all_sites_of_forty_layers_are_taken(name, target):
    changes = EVERY_LAYER.get(name) or VARIANTS[name]
    if name == "windowed":
        changes = {"local_attn_layers": tuple(n for n in range(40) if n % 4 != 3)}
    config = replace(FOAL, hidden_size=64, head_dim=16, num_query_groups=2, **changes)
    inputs = [x.to("meta") for x in random_inputs(config, 3, 2, 5, 4)]
    graph = capture(DiT(config, device="meta").eval(), (*inputs, 3), dynamic_shapes=DYNAMIC)
    graph = passes.run(replace(graph, target=target))
    assert graph.taken("raise_attention") == 40
    assert graph.taken("fuse_gate") == (0 if name == "no_gate" else 40)
    assert graph.taken("fuse_qkv") == 40
    assert graph.taken("fuse_activation") == 40
    assert graph.taken("fuse_add_norm") == 79
    assert graph.taken("pair_rope") == (0 if target == "cpu" else 40)
    assert graph.taken("pad_mlp") == (0 if target == "cpu" else 36)  # the others are 256 wide
    arithmetic = ("aten.mul", "aten.sigmoid", "aten.to.", "aten.rms_norm", "horsepower.rope", "horsepower.rms_norm")
    left = [(str(node.target), node.meta.get("module", "")) for node in graph.nodes.nodes]
    left = [(target, module) for target, module in left if target.startswith(arithmetic) and "layers" in module]
    last = "block.layers.39.mlp"  # no norm follows the last sum, so its branch is widened, or normed, by itself
    expected = (
        [("horsepower.rms_norm.default", f"{last}_post_norm")] if name == "post_norm" else [("aten.to.dtype", last)]
    )
    first = ("horsepower.rms_norm.default", "block.layers.0.attention.pre_norm")
    assert left == [first, *expected]
    assert {site.refused for site in graph.sites if site.refused and site.rewrite != "lower"} == {"it has a bias"}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_stage_computes_the_model(name):
    model = random_model(variant(name))
    graph = capture(model, (*random_inputs(model.config, 3, 2, 5, 4), 3), dynamic_shapes=DYNAMIC)
    inputs = (*random_inputs(model.config, 4, 3, 1, 2), 4)
    with torch.no_grad():
        want = model(*inputs)
        for each in passes.PASSES:
            passes.run(graph, (each,))
            got = graph.run(weights_of(model), *inputs)
            assert max(map(relative_error, got, want)) < 0.02, each.__name__


@pytest.mark.parametrize("target", ["cpu", "sm_90"])
@pytest.mark.parametrize("name", VARIANTS)
def test_in_float64_nothing_is_rounded_away(name, target):
    """The exact model through all passes is the exact model: a rewrite that changed the function would show."""
    model = random_model(replace(variant(name), params_dtype=torch.float64), torch.float64)
    example = [x.double() for x in random_inputs(model.config, 3, 2, 5, 4)]
    graph = passes.run(replace(capture(model, (*example, 3), dynamic_shapes=DYNAMIC), target=target))
    assert graph.taken("fuse_add_norm") == 5
    inputs = [x.double() for x in random_inputs(model.config, 2, 5, 3, 6)]
    with torch.no_grad():
        got, want = graph.run(weights_of(model), *inputs, 2), model(*inputs, 2)
    assert max(map(relative_error, got, want)) < 1e-13


class Branch(nn.Module):
    """h + W act(V norm(h)), then normed: what the fusions look for, with one thing changed at a time."""

    def __init__(self, change=None):
        super().__init__()
        self.change = change
        self.up, self.down = nn.Linear(8, 16, bias=change == "bias"), nn.Linear(16, 8, bias=change == "bias")
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, h):
        u = self.up(F.rms_norm(h, (8,), self.gain, 1e-6))
        z = u.clamp(max=6 if self.change == "clamp" else 7)
        d = self.down(z * torch.sigmoid((1.7 if self.change == "alpha" else 1.702) * z))
        total = h - d if self.change == "difference" else d + h
        normed = F.rms_norm(total, (8,), self.gain, 1e-6)
        if self.change == "second use":
            return total, normed, d
        return total, normed


@pytest.mark.parametrize(
    ("change", "activation", "add_norm"),
    [
        (None, 1, 1),
        ("bias", 0, 0),
        ("clamp", 0, 1),
        ("alpha", 0, 1),
        ("difference", 1, 0),
        ("second use", 1, 0),
    ],
)
def test_what_only_looks_alike_is_left(change, activation, add_norm):
    torch.manual_seed(0)
    module, h = Branch(change), torch.randn(5, 8)
    graph = passes.run(capture(module, (h,)))
    assert (graph.taken("fuse_activation"), graph.taken("fuse_add_norm")) == (activation, add_norm)
    with torch.no_grad():
        for got, want in zip(graph.run(weights_of(module), h), module(h), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


class Cross(nn.Module):
    def forward(self, q, k):
        q, k = (x.transpose(0, 1)[None] for x in (q, k))
        return F.scaled_dot_product_attention(q, k, k)[0].transpose(0, 1)


@pytest.mark.parametrize("keys", [5, 7])
def test_attention_to_another_sequence(keys):
    q, k = torch.randn(5, 2, 8), torch.randn(keys, 2, 8)
    graph = passes.run(capture(Cross(), (q, k)))
    assert graph.taken("raise_attention") == 1
    torch.testing.assert_close(graph.run({}, q, k), Cross()(q, k))


def test_a_broken_graph_is_found():
    graph = capture(Branch(), (torch.randn(5, 8),))
    last = [node for node in graph.nodes.nodes if node.op == "call_function"][-1]
    last.meta.pop("val")
    with pytest.raises(SpecError, match="after nothing.*value and a module"):
        check(graph, "nothing")
    graph = capture(Branch(), (torch.randn(5, 8),))
    calls = [node for node in graph.nodes.nodes if node.op == "call_function"]
    calls[-1].append(calls[0])
    with pytest.raises(SpecError, match="inputs come before it"):
        check(graph, "nothing")
