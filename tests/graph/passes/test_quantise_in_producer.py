"""What takes a static scale is bounded: attention of modules whose values are not made of normed rows."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from horsepower.graph.passes import PASSES
from horsepower.kernels.ops import ops
from horsepower.runtime.compiled import compile
from horsepower.runtime.models.dit import rotate
from recordings import relative_error

BF16 = torch.bfloat16
WHOLE = [each for each in PASSES if each.__name__ != "lower"]
HEADS, D, L = 4, 16, 6
C = HEADS * D


class Block(nn.Module):
    """Attention of `rows(block, h)`, projected; `join` and `part` order heads as torch's attention does, and back."""

    def __init__(self, rows, join=lambda x: x.transpose(0, 1)[None], part=lambda o: o[0].transpose(0, 1).flatten(1)):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rows, self.join, self.part = rows, join, part
        shapes = {"qkv": (3 * C, C), "before": (C, C), "proj": (C, C), "side": (C, C)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter((torch.randn(shape, generator=generator) / 8).to(BF16)))
        for name, columns in {"gain": C, "head_gain": D, "q_gain": D, "k_gain": D}.items():
            setattr(self, name, nn.Parameter(1 + torch.randn(columns, generator=generator) / 8))

    def forward(self, h, rope):
        q, k, v = (x.unflatten(-1, (-1, D)) for x in F.linear(self.rows(self, h), self.qkv).split((C,) * 3, -1))
        q = rotate(F.rms_norm(q.float(), (D,), self.q_gain, 1e-6), rope).to(BF16)
        k = rotate(F.rms_norm(k.float(), (D,), self.k_gain, 1e-6), rope).to(BF16)
        o = F.scaled_dot_product_attention(*(self.join(x) for x in (q, k, v)))
        return F.linear(self.part(o), self.proj)


def normed(block, h):
    return F.rms_norm(h.float(), (C,), block.gain, 1e-6).to(BF16)


class Summed(Block):
    """Attention of a sum, which is normed for another branch."""

    def forward(self, h, rope):
        total = h + F.linear(h, self.before)
        return super().forward(total, rope) + 0.1 * F.linear(normed(self, total), self.side)


def by_head(block, h):
    return F.rms_norm(h.unflatten(1, (HEADS, D)), (D,), block.head_gain.to(BF16), 1e-6).flatten(1)


def in_pairs(x):
    return x.unflatten(0, (2, 3)).transpose(1, 2)


def refusals(module, scale=200.0):
    """Why inputs are quantised apart, having compared the plan with eager."""
    generator = torch.Generator().manual_seed(1)
    h = (torch.randn(L, C, generator=generator) * scale).to(BF16)
    angle = torch.randn(L, 3 * (D // 8), generator=generator)
    rope = torch.cat((angle.sin(), angle.cos()), 1)
    run = compile(module, (h, rope), target="sm_90", scheme="fp8", only=WHOLE, cache=False)
    with torch.no_grad():
        assert relative_error(run(h, rope), module(h, rope)) < 0.1
    return Counter(site.refused for site in run.plan.sites if site.rewrite == "quantise_in_producer")


@pytest.mark.parametrize("size", [1, 1000])
def test_values_of_normed_rows_are_bounded(size):
    """By the rows of the weight that make them, which may be larger than those of queries and keys."""
    block = Block(normed)
    block.qkv.data[2 * C :] *= size
    assert refusals(block) == {None: 2}


UNBOUNDED = "what attention reads as values is not known to be bounded"


def test_values_of_a_sum_are_not_bounded_though_it_is_normed_elsewhere():
    found = refusals(Summed(lambda _, total: total))
    assert found[UNBOUNDED] == found["it reads the sum, not what is normed of it"] == 1


def test_values_of_rows_that_are_normed_by_the_head_are_not_known_to_be_bounded():
    assert refusals(Block(by_head)) == {UNBOUNDED: 1, "it reads a view of normed rows": 1}


@pytest.mark.parametrize(
    ("join", "part"),
    [
        (lambda x: x[None].transpose(1, 2), lambda o: o.transpose(1, 2).flatten(2)[0]),
        (in_pairs, lambda o: o.transpose(1, 2).flatten(2).flatten(0, 1)),
    ],
)
def test_attention_over_a_batch_is_quantised_apart(join, part):
    found = refusals(Block(normed, join, part))
    assert found == {None: 1, "attention over a batch has no kernel that quantises": 1}


@pytest.mark.parametrize("scheme", [None, "fp8"])
def test_codes_that_a_model_makes_itself_stay_as_they_are(scheme):
    class Own(nn.Module):
        def forward(self, x):
            z = x.clamp(max=7)
            codes, scales = ops.quantise((z * torch.sigmoid(1.702 * z)).to(BF16))
            return codes.float() * scales, *ops.quantise(F.rms_norm(x, (C,), None, 1e-6).to(BF16))

    x = torch.randn(L, C, generator=torch.Generator().manual_seed(0))
    got = compile(Own(), (x,), target="sm_90", scheme=scheme, only=WHOLE, cache=False)(x)
    for one, want in zip(got, Own()(x), strict=True):
        torch.testing.assert_close(one.float(), want.float())
