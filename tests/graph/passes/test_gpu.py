"""The passes that lay weights out for GPUs: what they refuse, and how a plan for one is made without one."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from horsepower.bench import step
from horsepower.graph import passes, provenance
from horsepower.graph.capture import capture
from horsepower.graph.passes.pad_mlp import UP
from horsepower.graph.passes.pair_rope import FUSED
from horsepower.graph.verify import AS_GIVEN, check_sites
from horsepower.kernels import tables
from horsepower.kernels.choice import choose
from horsepower.kernels.ops import ops
from horsepower.kernels.rates import OF_TARGET
from horsepower.kernels.registry import OPS
from horsepower.kernels.tables import Candidate, Point, Site, Table, Timed
from horsepower.runtime.compiled import compile
from horsepower.runtime.executor import weights_of
from horsepower.runtime.fused import VELOCITY_SHAPES, velocity_example
from models import DYNAMIC, TINY, random_inputs, random_model


class Mlp(nn.Module):
    """An up-projection that is 40 wide, and what reads it."""

    def __init__(self, reader):
        super().__init__()
        self.reader = reader
        self.up, self.down = (nn.Parameter(torch.randn(*shape)) for shape in ((40, 8), (8, 40)))

    def forward(self, x):
        return self.reader(self, ops.linear_activation(x, self.up, 1, [], "silu", torch.float32))


def linear(self, h):
    return ops.linear(h, self.down, 1, [])


def compiled_for(target, module, *inputs):
    graph = replace(capture(module, inputs), target=target)
    return passes.run(graph, (passes.pad_mlp, passes.pair_rope))


def test_the_width_between_projections_is_padded():
    module, x = Mlp(linear), torch.randn(5, 8)
    graph = compiled_for("sm_90", module, x)
    assert [node.meta["val"].shape[-1] for node in graph.nodes.nodes if node.target is UP] == [128]
    with torch.no_grad():
        torch.testing.assert_close(graph.run(weights_of(module), x), module(x))
    assert compiled_for("cpu", module, x).sites == []


@pytest.mark.parametrize(
    "reader", [lambda self, h: (linear(self, h), h), lambda self, h: h.sum(), lambda self, h: ops.linear(h, h, 1, [])]
)
def test_a_width_that_others_see_stays(reader):
    module, x = Mlp(reader), torch.randn(5, 8)
    graph = compiled_for("sm_90", module, x)
    assert [site.refused for site in graph.sites] == ["something else than a projection reads it"]
    with torch.no_grad():
        torch.testing.assert_close(graph.run(weights_of(module), x), module(x))


class Attention(nn.Module):
    """Two query heads and one of keys; `reader` gets queries, keys and values."""

    def __init__(self, reader):
        super().__init__()
        self.reader = reader
        self.weight, self.gain, self.rope = (nn.Parameter(torch.randn(*shape)) for shape in ((32, 8), (8,), (5, 4)))

    def forward(self, x):
        q, k, rest = ops.linear_qk_norm_rope(
            x, self.weight, self.gain, self.gain, self.rope, 1, [], 2, 1, 8, 1e-6, False
        )
        return self.reader(q, k, rest[:, None])


def attend(q, k, v):
    return ops.attention(q, k, v, None, 1, [], 1, 0, -1)


@pytest.mark.parametrize(
    ("reader", "paired"),
    [
        (attend, True),
        (lambda q, k, v: (attend(q, k, v), q), False),
        (lambda q, k, v: attend(k, k, v), False),
        (lambda q, k, v: attend(q[:, :1], q[:, 1:], v), False),
        (lambda q, k, v: attend(q, k, k), False),
        (lambda q, k, v: attend(q, k, v) + attend(q, k, v.cos()), False),
    ],
)
def test_heads_are_paired_for_one_attention_alone(reader, paired):
    module, x = Attention(reader), torch.randn(5, 8)
    graph = compiled_for("sm_80", module, x)
    assert [node.args[-1] for node in graph.nodes.nodes if node.target is FUSED] == [paired]
    assert [site.refused is None for site in graph.sites] == [paired]
    with torch.no_grad():
        for got, want in zip(graph.run(weights_of(module), x), module(x), strict=True):
            torch.testing.assert_close(got, want)


def test_a_plan_for_a_gpu_that_is_not_there():
    model = random_model(replace(TINY, hidden_size=256, head_dim=128))
    inputs = random_inputs(model.config, 3, 2, 5, 4)
    here, there = (
        compile(model, (*inputs, 3), dynamic_shapes=DYNAMIC, target=target).plan for target in ("cpu", "sm_90")
    )
    for op in ("linear_qk_norm_rope", "linear_activation"):
        counts = [sum(call.target == f"horsepower.{op}.default" for call in plan.calls) for plan in (here, there)]
        assert counts == [0, TINY.num_layers]
    assert there.target == "sm_90"
    with pytest.raises(ValueError, match=r"target: got 'sm_70', allowed: cpu, sm_80, sm_90"):
        compile(model, (*inputs, 3), dynamic_shapes=DYNAMIC, target="sm_70")


def test_what_no_kernel_takes_becomes_its_parts():
    module, x = Attention(attend), torch.randn(5, 8)
    graph = passes.run(replace(capture(module, (x,)), target="sm_90"))
    assert FUSED not in [node.target for node in graph.nodes.nodes]
    assert "linear_qk_norm_rope: a head has 8 dimensions, not 128" in [site.refused for site in graph.sites]


class Projection(nn.Module):
    """An up-projection that is not padded, between the sizes of a prompt."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(256, 512, dtype=torch.bfloat16))

    def forward(self, x):
        return ops.linear_activation(x.sin(), self.up, 1, [], "silu", torch.bfloat16)


def lowered(rows=5):
    module, x = Projection(), torch.randn(rows, 512, dtype=torch.bfloat16)
    graph = capture(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    graph = passes.run(replace(graph, target="sm_90"), (passes.lower,))
    names = [str(node.target) for node in graph.nodes.nodes if "horsepower" in str(node.target)]
    return names, [site.refused for site in graph.sites]


WHOLE, PARTS = ["horsepower.linear_activation.default"], ["horsepower.linear.default", "horsepower.activation.default"]


def test_a_call_is_whole_or_in_parts_as_is_predicted_at_thousands_of_tokens(monkeypatch):
    assert lowered() == (WHOLE, [])
    h100 = OF_TARGET["sm_90"]
    monkeypatch.setitem(OF_TARGET, "sm_90", replace(h100, triton=0.1))
    names, refused = lowered()
    assert names == PARTS
    inputs = [torch.empty(n, 512, dtype=torch.bfloat16, device="meta") for n in (5 * 820, 256)]  # 820: 4096 / 5
    choice = choose(OPS["linear_activation"], (*inputs, 1, [], "silu", torch.bfloat16), "sm_90")
    assert refused == [f"linear_activation: {choice}"]
    assert str(choice).startswith("predicted: parts ")
    # few tokens wait for the weight to be read, however slow the product
    monkeypatch.setattr(sys.modules[passes.lower.__module__], "TOKENS", 1)
    assert lowered() == (WHOLE, [])


def test_a_call_is_whole_or_in_parts_as_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    inputs = [torch.empty(n, 512, dtype=torch.bfloat16, device="meta") for n in (4100, 256)]
    op = OPS["linear_activation"]
    key = Site.of(op, (*inputs, 1, [], "silu", torch.bfloat16)).key
    config = next(iter(tables.configs(op.name, "sm_90")))
    for parts, whole, expected in ((3.0, 4.0, PARTS), (4.0, 3.0, WHOLE)):
        timed = (
            Timed(Candidate(kernel, text), (us, us, us))
            for kernel, text, us in (("parts", None, parts), ("triton", config, whole))
        )
        tables.write(Table(op.name, "sm_90", {}, {key: (Point(4110, tuple(timed)),)}), tmp_path)
        names, refused = lowered()
        assert names == expected
        why = "linear_activation: measured: parts 0.003 ms, triton 0.004 ms at 4110 tokens"
        assert refused == ([why] if expected == PARTS else [])


def checks_for_a_gpu(model):
    """Each rewrite of a plan for sm_90, executed by the references."""
    example = velocity_example(model)
    captured = replace(capture(model, example, None, VELOCITY_SHAPES, "velocity"), target="sm_90")
    compiled = provenance.snapshot(captured)
    changed = provenance.rewrite(compiled, passes.PASSES)
    inputs = pytree.tree_leaves(step.inputs(model, step.Tokens(12, 5, 4, 2)))
    return check_sites(captured, compiled, changed, weights_of(model), inputs, kinds=(AS_GIVEN,))


@pytest.fixture(scope="module")
def rotated():
    return random_model(replace(TINY, num_layers=2, mm_layers=(1,), gelu7_layers=(0,), hidden_size=256, head_dim=128))


def test_what_is_laid_out_otherwise_is_verified_with_what_reads_it(rotated):
    """Paired heads and padded widths have no twin in the captured graph; what comes out behind them has."""
    checks = checks_for_a_gpu(rotated)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    found = {check.rewrite: check.kernels for check in checks}
    assert {"linear_qk_norm_rope", "attention", "pair_heads"} == set(found["pair_rope"])
    assert {"linear_activation", "linear", "pad_weight"} == set(found["pad_mlp"])


@pytest.mark.parametrize(("recipe", "rewrite"), [("pair_heads", "pair_rope"), ("pad_weight", "pad_mlp")])
def test_a_wrong_recipe_is_found(rotated, monkeypatch, recipe, rewrite):
    op = OPS[recipe]

    def wrong(*inputs):
        return tuple(x.roll(1, 0) for x in op.reference(*inputs))

    monkeypatch.setitem(OPS, recipe, replace(op, reference=wrong))
    assert {check.rewrite for check in checks_for_a_gpu(rotated) if not check.passed} >= {rewrite}
