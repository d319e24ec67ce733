"""The arena: what a plan states is what is there, nothing else is allocated, and nothing stale is read."""

import weakref
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import horsepower
from horsepower.bench.live import live_peak
from horsepower.graph.call import Ref
from horsepower.graph.operators import operator_of
from horsepower.kernels.registry import op_of
from horsepower.runtime import executor
from horsepower.runtime.executor import Executor, weights_of
from horsepower.runtime.fused import FusedDiT
from models import VARIANTS, compiled, random_inputs, random_model, variant


@cache
def made(name):
    model = random_model(variant(name))
    return model, compiled(model)


@cache
def made_velocity(name):
    model = random_model(variant(name))
    return model, FusedDiT(model).compiled


def inputs_of(model, frames, tokens, audio, text):
    return (*random_inputs(model.config, frames, tokens, audio, text), frames)


def call_by_call(plan, weights, inputs):
    """The plan with memory from the allocator, freed as soon as nobody needs it."""
    env = {weight.value: weights[weight.name] for weight in plan.weights}

    def execute(call):
        def value(arg):
            if isinstance(arg, list | tuple):
                return type(arg)(map(value, arg))
            return env[arg.name] if isinstance(arg, Ref) else arg

        op = op_of(call.target)
        run = operator_of(call.target) if op is None else op.single_result if op.single else op
        env[call.result] = run(*value(call.args), **{name: value(arg) for name, arg in call.kwargs})
        for name in call.frees:
            del env[name]

    for call in plan.loads:
        execute(call)
    env.update(zip(plan.inputs, inputs, strict=True))

    def run():
        for call in plan.calls:
            execute(call)

    return run


def velocity_inputs(model):
    video, audio, text, coords, frames = inputs_of(model, 5, 100, 60, 40)
    with torch.no_grad():
        return video, audio, model.condition(text, coords), frames


# Without bfloat16_residual: no kernel adds to that, and what a reference makes in between is in no plan.
@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"bfloat16_residual"}))
def test_the_stated_peak_is_what_lives(name):
    model, run = made_velocity(name)
    inputs = velocity_inputs(model)
    stated = run.plan.at({"video_0": 500, "audio_0": 60, "condition_text_0": 40, "frames": 5}).peak
    with torch.no_grad():
        counted = live_peak(call_by_call(run.plan, weights_of(model), tree_leaves(inputs)))
        eager = live_peak(lambda: model.velocity(*inputs))
    assert stated == pytest.approx(counted, rel=0.01)
    assert stated < 0.35 * eager


def test_a_second_run_allocates_its_outputs_alone():
    """The matrix products of oneDNN take scratch memory for the time of a call, which no dispatcher sees."""
    model, run = made_velocity("default")
    inputs = velocity_inputs(model)
    size = sum(x.nbytes for x in run(*inputs))
    assert live_peak(lambda: run(*inputs)) == size


def test_nothing_stale_is_read():
    """Lengths take turns in one arena that is filled with NaN in between."""
    model, run = made("windowed")
    lengths = [(3, 2, 5, 4), (4, 30, 7, 9), (1, 1, 0, 1), (3, 2, 5, 4), (4, 30, 7, 9)]
    for length in lengths:
        inputs = inputs_of(model, *length)
        with torch.no_grad():
            first = run(*inputs)
            (arena,) = run._run._idle
            arena._memory.fill_(255)
            again = run(*inputs)
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, again, strict=True))


def test_an_arena_remembers_a_bounded_number_of_sizes(monkeypatch):
    monkeypatch.setattr(executor, "PROGRAMS", 2)
    model = random_model(variant("default"))
    run = compiled(model)
    for tokens in (5, 4, 3, 2, 5):
        inputs = inputs_of(model, 2, tokens, 5, 4)
        run(*inputs)
    (arena,) = run._run._idle
    assert len(arena._programs) == 2


class Mixed(nn.Module):
    """Operators that write where they are told, operators that allocate, views of inputs, weights and results."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("table", torch.arange(64.0).view(8, 8))

    def forward(self, x, scale):
        y = x.t().contiguous().sin() @ self.weight.t()
        z = F.scaled_dot_product_attention(y[None, None], y[None, None], y[None, None])[0, 0]
        top, index = torch.topk(z, 2, dim=1)
        part, mixed = self.table[1:3].expand(2, 8), y[: x.shape[1]].relu() + 1
        return {
            "sum": z.sum(0) * scale,
            "top": (top, index),
            "part": part,
            "mixed": mixed,
            "x": x[:2],
        }


@pytest.mark.parametrize("strided", [False, True])
def test_all_kinds_of_values(strided):
    torch.manual_seed(0)
    module = Mixed()
    dims = ({0: None, 1: torch.export.Dim.DYNAMIC}, None)
    run = horsepower.compile(module, (torch.randn(8, 6), 2.0), dynamic_shapes=dims)
    for columns in (6, 5, 6, 1):
        x = torch.randn(16, 2 * columns)[::2, ::2] if strided else torch.randn(8, columns)
        with torch.no_grad():
            got, want = run(x, 2.0), module(x, 2.0)
        assert got.keys() == want.keys()
        torch.testing.assert_close(got, want)
        got["x"].fill_(7)
        got["part"].fill_(7) if got["part"].is_contiguous() else None
        assert not (x == 7).any()
        assert not (module.table[1:3] == 7).all()


def test_a_weight_of_another_shape_is_refused():
    model, run = made("default")
    weights = weights_of(model)
    name = "block.layers.0.attention.linear_qkv.weight"
    for wrong in (weights[name][:-1], weights[name].float()):
        with pytest.raises(ValueError, match=rf"{name}: got .*, allowed: \["):
            Executor(run.plan, {**weights, name: wrong})


def test_a_failed_run_leaves_the_plan_usable():
    model, run = made("windowed")
    good = inputs_of(model, 3, 2, 5, 4)
    want = run(*good)
    with pytest.raises(ValueError, match="frames: got 4 for 6"):
        run(*good[:4], 4)
    assert all(torch.equal(a, b) for a, b in zip(run(*good), want, strict=True))


def test_a_watched_twin_executes_what_it_is_told_and_leaves_the_first_alone():
    model, run = made("default")
    inputs, seen = inputs_of(model, 3, 6, 5, 4), []

    def around(call, step):
        return lambda env: (seen.append(call), step(env))

    twin = run.watched(around)
    wanted = tree_leaves(run(*inputs))
    assert seen == []
    for _ in range(2):  # the run that binds, and another
        seen.clear()
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(twin(*inputs)), wanted, strict=True))
        assert seen == [call for call in run.plan.calls if call in seen]  # in their order, each once
        assert {"horsepower.attention.default", "horsepower.linear.default"} <= {call.target for call in seen}
    seen.clear()
    run(*inputs)
    assert seen == []


def test_memory_is_given_back_and_taken_anew():
    model, run = made_velocity("default")
    inputs = velocity_inputs(model)
    with torch.no_grad():
        want = run(*inputs)
        assert run.arena_bytes > 0
        arena = weakref.ref(run._run._idle[0]._memory.untyped_storage())
        run.drop_arenas()
        assert run.arena_bytes == 0
        assert arena() is None
        assert all(torch.equal(a, b) for a, b in zip(run(*inputs), want, strict=True))


class Halves(nn.Module):
    """Two weights that share memory once they are loaded."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return x @ self.weight[:2].T @ self.weight[4:, :2]


def test_weights_move_as_they_lie():
    """What shares memory shares it there; back from where values are kept, they are the same."""
    module, x = Halves(), torch.randn(3, 4)
    run = horsepower.compile(module, (x,))

    def places(executor):
        made = [x for x in executor._fixed.values() if isinstance(x, torch.Tensor)]
        first = {}  # which storage, in the order in which they are met
        order = [first.setdefault(x.untyped_storage()._cdata, len(first)) for x in made]
        size = sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in made}.values())
        return [(x.shape, x.stride(), x.storage_offset(), n) for x, n in zip(made, order, strict=True)], size

    with torch.no_grad():
        run(x)
    before = places(run._run)
    assert len({n for *_, n in before[0]}) < len(before[0])
    run.to(torch.device("meta"))
    assert places(run._run) == before
    assert all(x.is_meta for x in run._run._fixed.values())
    assert run.arena_bytes == 0
