"""Times against the formula, bytes against what is counted by hand, FLOPs against the specified workload."""

from dataclasses import astuple, replace
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from horsepower import predicting
from horsepower.bench.roofline import Kernel, Rung, grouped, ladder
from horsepower.bench.step import Tokens
from horsepower.graph.capture import capture
from horsepower.kernels.rates import GPUS, Rates
from horsepower.quant.scheme import FP8
from horsepower.runtime.fused import velocity_example
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.presets import MODELS

BF16 = torch.bfloat16
RATES = Rates(matrix=100.0, fp8=None, attention=50.0, vector=10.0, memory=4.0)

# Source: the specification's workload table ("FLOPs of one forward"), counted by hand from the released shapes, 2 FLOP
# a multiply-add: width, height, latent frames, video, audio tokens; TFLOP of linear layers, of attention; 400 of text.
# Clips of 5 s: the first two are of one plan.
WORKLOAD = [
    ("distill", 448, 256, 32, 3584, 126, 89.7, 13.8),
    ("540p_sr", 896, 512, 32, 14336, 126, 324.4, 180.9),
    ("1080p_sr", 1920, 1088, 32, 65280, 126, 1436.2, 2402.0),
]


@cache
def planned(config):
    model = DiT(config, device="meta")
    return model, predicting.graphs_of(model, "sm_90", (FP8,) if config is MODELS["distill"] else ())


@cache
def rungs(variant, tokens):
    model, graphs = planned(MODELS[variant])
    return ladder(*graphs, pytree.tree_leaves(velocity_example(model, tokens.counts, tokens.frames)))


@pytest.mark.parametrize(("variant", "width", "height", "frames", "video", "audio", "linear", "attention"), WORKLOAD)
def test_flops_agree_with_the_specified_workload(variant, width, height, frames, video, audio, linear, attention):
    tokens = Tokens(video, audio, 400, frames)
    assert predicting.tokens_of({448: "256p", 896: "540p", 1920: "1080p"}[width]) == tokens
    for rung in rungs(variant, tokens):
        products = rung.total("flops", "matrix") + rung.total("flops", "fp8")
        assert products == pytest.approx(linear * 1e12, rel=0.01)
        assert (rung.total("flops", "fp8") > 0) == (rung.name == "plan, fp8")
        assert rung.total("flops", "attention") == pytest.approx(attention * 1e12, rel=0.01)
        assert rung.total("flops") == pytest.approx((linear + attention) * 1e12, rel=0.01)


def test_each_fusion_moves_less_and_is_predicted_to_take_less():
    found = rungs("distill", Tokens(3584, 126, 400, 32))
    for before, after in pairwise(found[:4]):
        assert after.total("bytes") < before.total("bytes")
        assert len(after.kernels) < len(before.kernels)
        for gpu in GPUS.values():
            assert after.seconds(gpu.reached) < before.seconds(gpu.reached)
    # linear + activation, + qk_norm_rope, + add_rms_norm: each once a layer; four wide ones are predicted faster apart
    names = [kernel.name for kernel in found[3].kernels]
    assert [sum(name.startswith(op) for name in names) for op in ("linear_activation", "linear_qk")] == [40, 40]
    assert (names.count("linear_add_rms_norm"), names.count("add_rms_norm")) == (79 - 4, 4)


def test_the_time_of_a_kernel_is_the_larger_of_its_two_ceilings():
    product, copy = Kernel("linear", "", "matrix", 800, 4), Kernel("to", "", "vector", 10, 40)
    assert (RATES.seconds(product), RATES.bound(product)) == (8.0, "matrix")
    assert (RATES.seconds(copy), RATES.bound(copy)) == (10.0, "memory")
    assert RATES.seconds(replace(product, unit="attention")) == 16.0
    rung = Rung("", (product, copy, copy))
    assert (rung.seconds(RATES), rung.seconds(RATES, "vector"), rung.total("bytes", "matrix")) == (28.0, 20.0, 4)
    assert grouped(rung.kernels) == [(product, 1), (copy, 2)]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_what_is_reached_stays_below_the_datasheet(gpu):
    for reached, peak in zip(astuple(gpu.reached), astuple(gpu.peak), strict=True):
        assert (reached is None) == (peak is None)
        assert reached is None or reached <= peak


class Chains(nn.Module):
    """A chain before a product, one after it that reads the first's result, two halves and two unconnected calls."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False, dtype=BF16)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x):
        wide = F.rms_norm(x.float() * 2, (8,), self.gain)
        left, right = self.up(wide.to(BF16)).chunk(2, dim=-1)
        return F.silu(left) * right + wide, x.exp()


def test_chains_are_cut_at_products_and_count_what_crosses_them():
    x = torch.empty(5, 8, dtype=BF16)
    graph = capture(Chains(), (x,), None, None, "forward")
    eager, chains = ladder(graph, graph, {}, [x])[:2]
    n = x.numel()
    assert [(kernel.name, kernel.unit, kernel.bytes) for kernel in sorted(chains.kernels, key=lambda k: k.name)] == [
        ("aten.exp", "vector", 2 * n * 2),
        ("aten.linear", "matrix", 2 * (n + 2 * n + 8 * 16)),
        ("aten.silu + aten.mul + aten.add", "vector", 2 * 2 * n + 4 * n + 4 * n),
        ("aten.to + aten.mul + aten.rms_norm", "vector", 2 * n + 4 * 8 + 4 * n + 2 * n),
    ]
    assert chains.total("flops") == eager.total("flops")
    assert sorted(kernel.where for kernel in chains.kernels) == ["the model", "the model", "the model", "up"]


def test_products_of_float32_run_without_matrix_units():
    x = torch.empty(4, 8)
    graph = capture(nn.Linear(8, 8, bias=False), (x,), None, None, "forward")
    assert [kernel.unit for kernel in ladder(graph, graph, {}, [x])[0].kernels] == ["vector"]
