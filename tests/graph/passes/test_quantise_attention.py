"""Attention in eight bits: by itself a switch, off in every other scheme, and refused where a bound is not known."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from horsepower.graph import passes
from horsepower.graph.capture import capture
from horsepower.graph.formats import formats
from horsepower.graph.passes import PASSES
from horsepower.quant.scheme import FP8, FP8_ATTENTION, FP8_TENSOR
from horsepower.runtime.compiled import compile
from horsepower.runtime.models.dit import DiT, rotate
from models import DYNAMIC, TINY, VARIANTS, random_inputs, random_model
from recordings import relative_error

WHOLE = [each for each in PASSES if each.__name__ != "lower"]
CONFIG = replace(TINY, num_layers=2, mm_layers=(0,), hidden_size=128, head_dim=32)
LARGEST = 64.0


def run(model, scheme, target="sm_90", **how):
    example = (*random_inputs(model.config, 3, 2, 5, 4), 3)
    return compile(model, example, dynamic_shapes=DYNAMIC, target=target, scheme=scheme, only=WHOLE, cache=False, **how)


def names(plan):
    return Counter(call.target.removeprefix("horsepower.").removesuffix(".default") for call in plan.calls)


def reasons(plan):
    return Counter(site.refused for site in plan.sites if site.rewrite == "quantise_attention")


@pytest.mark.parametrize("name", ["default", "windowed", "per_head"])
def test_every_attention_of_the_model(name):
    """Bounds, scales and gains are found when the plan is loaded; a step turns the values, and that is all."""
    model = random_model(replace(CONFIG, **VARIANTS[name]))
    plain, plan = (run(model, scheme).plan for scheme in (FP8, FP8_ATTENTION))
    layers = CONFIG.num_layers
    assert reasons(plan) == {None: layers}
    assert not reasons(plain)  # off, there is no word of it
    more = names(plan) - names(plain)
    assert {each: n for each, n in more.items() if not each.startswith("_operator")} == {"transpose_to_codes": layers}
    loads = Counter(call.target for call in plan.loads) - Counter(call.target for call in plain.loads)
    assert loads["horsepower.head_bound.default"] == 2 * layers
    assert loads["horsepower.value_bound.default"] == layers


@pytest.mark.parametrize("name", ["default", "windowed"])
def test_a_step_is_as_far_from_float64_as_its_codes_are(name):
    config = replace(CONFIG, **VARIANTS[name])
    model = random_model(config)
    exact = DiT(replace(config, params_dtype=torch.float64), torch.float64)
    exact.load_state_dict(model.state_dict())
    lengths = random_inputs(config, 3, 3, 2, 5)
    with torch.no_grad():
        want = exact(*(x.double() for x in lengths), 3)
        some, all_ = (run(model, scheme)(*lengths, 3) for scheme in (FP8, FP8_ATTENTION))
    for one, other, true in zip(all_, some, want, strict=True):
        assert not torch.equal(one, other)
        assert relative_error(one, true) < 1.6 * relative_error(other, true) < 0.2


def test_the_switch_composes_with_scales_a_tensor():
    layers = [f"block.layers.{n}.attention.linear_{what}" for n in range(CONFIG.num_layers) for what in ("qkv", "proj")]
    scheme = replace(FP8_TENSOR, attention=True).calibrated(dict.fromkeys(layers, LARGEST))
    plan = run(random_model(CONFIG), scheme).plan
    assert reasons(plan)[None] == CONFIG.num_layers


def test_attention_of_layers_that_are_kept_stays():
    names = ("block.layers.0.attention", "block.layers.1.attention.linear_qkv")
    plan = run(random_model(CONFIG), FP8_ATTENTION.keeping(names)).plan
    assert reasons(plan) == {f"kept: {names[0]}": 1, "its projection stays as it is": 1}
    run(random_model(CONFIG), FP8.keeping(names))  # one list for both, as checkpoints have


def test_heads_that_no_kernel_takes():
    config = replace(CONFIG, hidden_size=4 * 48, head_dim=48)
    assert reasons(run(random_model(config), FP8_ATTENTION).plan) == {"heads of 48 have no kernel of eight bits": 2}


HEADS, D = 4, 32
C = HEADS * D


class Heads(nn.Module):
    """What `read` makes of the normed and turned heads of each projection, (q, k, v) [L, HEADS, D], and of h."""

    def __init__(self, read, projections=1):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.read = read
        shapes = [(3 * C, C)] * projections
        self.qkv = nn.ParameterList((torch.randn(s, generator=generator) / 8).to(torch.bfloat16) for s in shapes)
        self.proj = nn.Parameter((torch.randn((C, C), generator=generator) / 8).to(torch.bfloat16))
        self.gain = nn.Parameter(1 + torch.randn(C, generator=generator) / 8)
        self.q_gain, self.k_gain = (nn.Parameter(torch.full((D,), gain)) for gain in (0.1, 3.0))

    def heads(self, h, rope, weight):
        n = F.rms_norm(h.float(), (C,), self.gain, 1e-6).to(torch.bfloat16)
        q, k, v = (x.unflatten(-1, (-1, D)) for x in F.linear(n, weight).split((C,) * 3, -1))
        q = rotate(F.rms_norm(q.float(), (D,), self.q_gain, 1e-6), rope).to(torch.bfloat16)
        return q, rotate(F.rms_norm(k.float(), (D,), self.k_gain, 1e-6), rope).to(torch.bfloat16), v

    def forward(self, h, rope):
        return self.read(self, *(self.heads(h, rope, weight) for weight in self.qkv))


def attend(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1).flatten(1)


def of_itself(block, heads):
    q, k, v = heads
    return F.linear(attend(q, q, v), block.proj) + F.linear(attend(k, k, v), block.proj)


def keys_elsewhere(block, heads):
    q, k, v = heads
    return F.linear(attend(q, q, v), block.proj) + F.linear(k.flatten(1), block.proj)


def heads_of_each_other(block, heads, others):
    return F.linear(attend(*heads[:2], others[2]), block.proj) + F.linear(attend(*others[:2], heads[2]), block.proj)


def turned_round(block, heads):
    return F.linear(attend(heads[1], heads[0], heads[2]), block.proj)


def one_of_two(block, heads, others):
    return F.linear(attend(*heads), block.proj) + F.linear(attend(*others), block.proj) + others[0].flatten(1)


READ = "something else reads queries or keys"


def example():
    generator = torch.Generator().manual_seed(1)
    angle = torch.randn(6, 3 * (D // 8), generator=generator)
    return torch.randn(6, C, generator=generator).to(torch.bfloat16), torch.cat((angle.sin(), angle.cos()), 1)


@pytest.mark.parametrize(
    ("read", "projections", "found"),
    [
        (of_itself, 1, {READ: 2}),
        (keys_elsewhere, 1, {READ: 1}),
        (heads_of_each_other, 2, {None: 2}),
        (turned_round, 1, {None: 1}),
        (one_of_two, 2, {None: 1, READ: 1}),
    ],
)
def test_modules_that_read_their_heads_in_other_ways(read, projections, found):
    module, given = Heads(read, projections), example()
    with torch.no_grad():
        want = module(*given)
        plain, made = (
            compile(module, given, target="sm_90", scheme=scheme, only=WHOLE, cache=False)
            for scheme in (FP8, FP8_ATTENTION)
        )
        assert reasons(made.plan) == found
        assert relative_error(made(*given), want) < 1.5 * relative_error(plain(*given), want) < 0.2


def test_two_attentions_of_one_module_are_told_apart():
    captured = capture(Heads(one_of_two, 2), example())
    graph = passes.run(replace(captured, target="sm_90", scheme=FP8_ATTENTION), WHOLE)
    said = [(each.input, each.kept) for each in formats(graph) if each.call == "attention"]
    assert said == [("e4m3", ""), ("bfloat16", READ)]
