"""Verification passes what is right, on every variant of the model, and finds what is made wrong on purpose."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import horsepower
from horsepower.graph import exact, passes, provenance
from horsepower.graph.capture import capture
from horsepower.graph.compare import FLUSHED
from horsepower.graph.graph import args_of
from horsepower.graph.passes import PASSES, fuse_add_norm, fuse_gate, fuse_qkv, lower, raise_rope
from horsepower.graph.plan import plan_of
from horsepower.graph.spec import SpecError
from horsepower.graph.verify import AS_GIVEN, HOSTILE, Check, check_sites, check_whole
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import OPS, Kernel
from horsepower.runtime.executor import Executor, weights_of
from models import DYNAMIC, TINY, VARIANTS, random_inputs, random_model, variant

SIZES = (4, 7, 5, 3)  # frames, video tokens a frame, audio, text


@cache
def traced(name, dtype):
    """A variant's model and its captured graph, which nobody changes."""
    config = variant(name) if dtype == torch.bfloat16 else replace(variant(name), params_dtype=dtype)
    model = random_model(config, dtype)
    return model, capture(model, (*inputs_of(model, 3, 2, 5, 4), 3), dynamic_shapes=DYNAMIC)


def inputs_of(model, *sizes):
    return [x.to(model.final_linear_video.weight.dtype) for x in random_inputs(model.config, *sizes)]


def sites_of(name="default", only=PASSES, kinds=(AS_GIVEN, "random", "tiny"), dtype=torch.bfloat16, sizes=SIZES):
    model, captured = traced(name, dtype)
    compiled = provenance.snapshot(captured)
    changed = provenance.rewrite(compiled, only)
    return check_sites(captured, compiled, changed, weights_of(model), [*inputs_of(model, *sizes), sizes[0]], kinds)


def whole_of(name="default", only=PASSES):
    model, captured = traced(name, torch.bfloat16)
    compiled = provenance.snapshot(captured)
    passes.run(compiled, only)
    weights = weights_of(model)
    return check_whole(captured, Executor(plan_of(compiled), weights), weights, [*inputs_of(model, *SIZES), SIZES[0]])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_right_plan_passes(name):
    sites, whole = sites_of(name, kinds=(AS_GIVEN, *HOSTILE)), whole_of(name)
    assert [check for check in sites if not check.passed] == []
    assert whole.passed
    assert 0 < whole.error_fused < 0.02
    rewrites = {check.rewrite for check in sites}
    gates = {"raise_attention"} if name == "no_gate" else {"fuse_gate"}
    assert rewrites >= {"fuse_qkv", "fuse_activation", "fuse_add_norm", "raise_rms_norm"} | gates
    assert {check.inputs for check in sites} == {AS_GIVEN, *HOSTILE}
    assert all(check.note in ("", FLUSHED) for check in sites)
    attention = [c for c in sites if c.kernels == ("attention",) and c.inputs == "random"]
    assert sum(c.count for c in attention) == 3
    assert all(0 < c.error_fused < 0.01 for c in attention)


def test_every_site_of_the_plan_is_checked():
    """Each call of one of our ops lies in exactly one region, and equal sites are counted, not repeated."""
    model = random_model(replace(TINY, num_layers=5, mm_layers=(0, 4)))
    captured = capture(model, (*random_inputs(model.config, 3, 2, 5, 4), 3), dynamic_shapes=DYNAMIC)
    compiled = provenance.snapshot(captured)
    changed = provenance.rewrite(compiled, PASSES)
    found = [node for region in provenance.regions(captured, compiled) for node in region.fused]
    assert len(found) == len(set(found))
    ours = {node for node in compiled.nodes.nodes if str(node.target).startswith("horsepower.")}
    assert ours <= set(found)
    inputs = [*random_inputs(model.config, *SIZES), SIZES[0]]
    sites = check_sites(captured, compiled, changed, weights_of(model), inputs, (AS_GIVEN,))
    counts = {(c.rewrite, c.module): c.count for c in sites}
    assert counts["fuse_qkv", "block.layers.1.attention"] == 3
    assert counts["fuse_activation", "block.layers.1.mlp"] == 3
    assert ("fuse_qkv", "block.layers.2.attention") not in counts


def failed(checks: tuple[Check, ...]) -> set[tuple[str, str]]:
    return {(check.rewrite, check.module) for check in checks if not check.passed}


def altered(monkeypatch, name, run):
    """The op `name` with a kernel that does what `run(real)` does."""
    op = OPS[name]
    kernel = op.kernels[0]
    wrong = Kernel("wrong", kernel.supports, run(kernel.run), kernel.workspace)
    monkeypatch.setitem(OPS, name, replace(op, kernels=(wrong,)))


def test_an_epsilon_ten_times_too_large_is_found(monkeypatch):
    def run(real):
        return lambda out, scratch, *args: real(out, scratch, *args[:-2], 10 * args[-2], args[-1])

    altered(monkeypatch, "add_rms_norm", run)
    sites = sites_of()
    assert {rewrite for rewrite, _ in failed(sites)} == {"fuse_add_norm"}
    assert {check.inputs for check in sites if not check.passed} == {"tiny"}


def test_a_last_row_that_is_not_written_is_found(monkeypatch):
    """On a second run the memory may hold the right values: outputs are NaN before each call."""

    def run(real):
        def short(out, scratch, *args):
            kept = out[0][-1].clone()
            real(out, scratch, *args)
            out[0][-1] = kept

        return short

    for name, rewrite in (("activation", "fuse_activation"), ("attention", "fuse_gate")):
        with monkeypatch.context() as patch:
            altered(patch, name, run)
            sites = sites_of()
            assert {found for found, _ in failed(sites)} == {rewrite}
            assert all("non-finite" in check.note for check in sites if not check.passed)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return F.rms_norm(x, (8,), self.gain, 1e-6).bfloat16()


def test_one_wrong_row_at_an_edge_does_not_drown(monkeypatch):
    def run(real):
        def wrong(out, scratch, *args):
            real(out, scratch, *args)
            out[0][-1] = 0

        return wrong

    altered(monkeypatch, "rms_norm", run)
    x = torch.randn(20000, 8)
    x[-1] = x[0]
    (check, *_) = horsepower.verify(Norm(), (x,))
    assert not check.passed
    assert check.value.endswith("edge rows")
    assert check.error_fused == pytest.approx(0.5**0.5, rel=0.01)  # one of two equal rows; of all it would be 0.007
    assert check.error_eager < 0.01


def test_swapped_experts_are_found(monkeypatch):
    def run(real):
        def swapped(out, scratch, x, weight, experts, counts):
            parts = weight.chunk(experts)
            real(
                out,
                scratch,
                x,
                torch.cat((parts[1], parts[0], *parts[2:])) if experts == 3 else weight,
                experts,
                counts,
            )

        return swapped

    altered(monkeypatch, "linear", run)
    sites = sites_of()
    assert ("fuse_qkv", "block.layers.0.attention") in failed(sites)
    assert ("fuse_qkv", "block.layers.1.attention") not in failed(sites)
    assert not whole_of().passed


def test_a_kernel_that_raises_fails_and_says_so(monkeypatch):
    def run(real):
        def refuses(out, scratch, *args):
            raise RuntimeError("no such rows")

        return refuses

    altered(monkeypatch, "qk_norm_rope", run)
    broken = [check for check in sites_of(kinds=("random",)) if not check.passed]
    assert {check.rewrite for check in broken} == {"fuse_qkv"}
    assert {check.note for check in broken} == {"no such rows"}


def with_pass(real, after):
    """The passes, with `after(graph)` done at the end of one of them."""

    def wrong(graph):
        real(graph)
        after(graph)

    wrong.__name__ = real.__name__
    return tuple(wrong if each is real else each for each in PASSES)


def change_args(target, change):
    def after(graph):
        for node in graph.nodes.nodes:
            if node.target is target:
                node.args = tuple(change(list(args_of(node))))

    return after


def ungated(args):
    return [*args[:3], None, 1, [], *args[6:]]


def exchanged(args):
    return [args[0], args[1], args[3], args[2], *args[4:]]


@pytest.mark.parametrize(
    ("real", "target", "change", "found"),
    [
        (fuse_gate, ops.attention.default, ungated, "fuse_gate"),
        (fuse_qkv, ops.linear_qk_norm_rope.default, exchanged, "fuse_qkv"),
        (
            fuse_add_norm, ops.linear_add_rms_norm.default,
            lambda args: [*args[:7], args[7] * 100, args[8]], "fuse_add_norm",
        ),
    ],
)  # fmt: skip
def test_a_pass_that_is_wrong_is_named(real, target, change, found):
    sites = sites_of(only=with_pass(real, change_args(target, change)))
    names = {rewrite for rewrite, _ in failed(sites)}
    assert names == {found}
    assert len(failed(sites)) >= 2


def test_a_rotation_the_other_way_is_found():
    def after(graph):
        for node in list(graph.nodes.nodes):
            if node.target is ops.rope.default:
                aten, half = torch.ops.aten, node.args[1].meta["val"].shape[1] // 2
                with graph.nodes.inserting_before(node):
                    sin, cos = (
                        graph.call(aten.slice.Tensor, node.args[1], 1, i * half, (i + 1) * half, like=node)
                        for i in range(2)
                    )
                    sin = graph.call(aten.neg.default, sin, like=node)
                    back = graph.call(aten.cat.default, [sin, cos], 1, like=node)
                node.args = (node.args[0], back, node.args[2])

    only = with_pass(raise_rope, after)
    broken = [check for check in sites_of(only=only, kinds=("random",)) if not check.passed]
    assert {check.rewrite for check in broken} == {"raise_rope"}
    assert sum(check.count for check in broken) == 6  # queries and keys of three layers
    assert not whole_of(only=only).passed


def test_an_operand_that_is_dropped_is_found():
    """What is not even read on the compiled side is an input of the captured side alone."""

    def after(graph):
        for node in graph.nodes.nodes:
            if node.target is ops.linear_add_rms_norm.default:
                normed = next(user for user in node.users if user.args[1] == 0)
                graph.replace(normed, args_of(node)[3])  # the residual, without its branch

    only = with_pass(fuse_add_norm, after)
    assert ("fuse_add_norm", "block.layers.0.mlp.pre_norm") in failed(sites_of(only=only))
    assert not whole_of(only=only).passed


def test_an_output_without_a_captured_name_is_an_error():
    def behind_its_back(graph):
        output = next(node for node in graph.nodes.nodes if node.op == "output")
        last = output.all_input_nodes[0]
        with graph.nodes.inserting_before(output):
            new = graph.call(torch.ops.aten.mul.Tensor, last, 1, like=last)
        last.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    with pytest.raises(SpecError, match="captured names"):
        sites_of(only=(*PASSES, behind_its_back))


def test_a_changed_operand_of_a_call_that_keeps_its_name_is_found():
    class Twice(nn.Module):
        def forward(self, x, y):
            return torch.sin(x) + torch.cos(y)

    def crossed(graph):
        sin, cos = (next(n for n in graph.nodes.nodes if n.name == name) for name in ("sin", "cos"))
        sin.replace_all_uses_with(cos)

    inputs = [torch.randn(5, 3), torch.randn(5, 3)]
    captured = capture(Twice(), tuple(inputs))
    compiled = provenance.snapshot(captured)
    changed = provenance.rewrite(compiled, (crossed,))
    (check,) = check_sites(captured, compiled, changed, {}, inputs, ("random",))
    assert (check.rewrite, check.passed) == ("crossed", False)


class Foreign(nn.Module):
    """Integers and rows of a table, not our model: indices keep the values that they have."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.down = nn.Linear(8, 8, bias=False)
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, tokens):
        h = self.table(tokens)
        total = h + self.down(F.rms_norm(h, (8,), self.gain, 1e-6))
        return F.rms_norm(total, (8,), self.gain, 1e-6)


def test_a_foreign_model():
    torch.manual_seed(0)
    model, tokens = Foreign(), torch.randint(11, (7,))
    captured = capture(model, (tokens,))
    compiled = provenance.snapshot(captured)
    changed = provenance.rewrite(compiled, PASSES)
    checks = check_sites(captured, compiled, changed, weights_of(model), [tokens])
    assert {check.rewrite for check in checks} == {"raise_rms_norm", "fuse_add_norm"}
    assert all(check.passed for check in checks)
    assert len(checks) == 2 * (1 + len(HOSTILE))


def test_a_module_of_ones_own():
    torch.manual_seed(0)
    model, rows = Foreign(), {0: torch.export.Dim.DYNAMIC}
    tokens = torch.randint(11, (300,))
    checks = horsepower.verify(model, (tokens[:7],), (tokens,), dynamic_shapes=(rows,))
    assert all(check.passed for check in checks)
    assert {check.rewrite for check in checks} == {"raise_rms_norm", "fuse_add_norm", "all passes"}
    with pytest.raises(ValueError, match="tokens: got"):
        horsepower.verify(model, (tokens[:7],), (tokens.float(),), dynamic_shapes=(rows,))


def test_in_float64_eager_is_exact():
    sites = sites_of(dtype=torch.float64, kinds=("random",))
    assert all(check.passed and check.error_eager == 0 for check in sites)
    assert max(check.error_fused for check in sites) < 1e-14


@pytest.mark.parametrize("name", ["default", "windowed", "per_head"])
def test_sampled_rows_have_the_error_of_all(name, monkeypatch):
    def attentions():
        sites = sites_of(name, kinds=("random",), sizes=(6, 60, 20, 30))
        return [check for check in sites if check.kernels == ("attention",)]

    everything = attentions()
    monkeypatch.setattr(exact, "LIMIT", 0)
    sampled = attentions()
    assert [check.rows for check in everything] == [None] * len(everything)
    for one, other in zip(sampled, everything, strict=True):
        assert exact.ROWS <= one.rows < 410
        assert 0 < one.error_fused < one.bound
        assert abs(one.error_eager / other.error_eager - 1) < 0.2


def test_the_sample_has_both_sides_of_every_edge(monkeypatch):
    monkeypatch.setattr(exact, "LIMIT", 0)
    monkeypatch.setattr(exact, "ROWS", 0)
    q, k, v = (torch.randn(1, 2, 50, 8) for _ in range(3))
    graph = fx.Graph()
    node = graph.call_function(exact.aten.scaled_dot_product_attention.default, tuple(map(graph.placeholder, "qkv")))
    sample = exact.Exact([node], edges=(30, 42, 50, 99))
    out = sample(node.target, q, k, v)
    assert sample.index.tolist() == [0, 29, 30, 41, 42, 49]
    full = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out[:, :, sample.index], full[:, :, sample.index])
    assert out.dtype == torch.float64
    assert not out[:, :, 1].any()


def test_lowering_alone_is_not_a_rewrite_of_what_is_left():
    captured = capture(Foreign(), (torch.randint(11, (7,)),))
    compiled = provenance.snapshot(captured)
    assert provenance.rewrite(compiled, (lower,)) == {}
    assert provenance.regions(captured, compiled) == []
    passes.run(captured, (lower,))
    assert provenance.regions(provenance.snapshot(captured), compiled) == []
