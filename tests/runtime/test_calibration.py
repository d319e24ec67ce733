"""What is measured of a layer is what its plan computes."""

from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

from horsepower.graph.call import Ref
from horsepower.graph.operators import operator_of
from horsepower.graph.passes import PASSES
from horsepower.graph.passes.lower import lower
from horsepower.graph.passes.quantise_in_producer import quantise_in_producer
from horsepower.kernels.linear import LINEAR
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import op_of
from horsepower.kernels.tables import arguments
from horsepower.quant.budget import ProductError
from horsepower.quant.quantised import quantise
from horsepower.quant.scheme import FP8, FP8_ATTENTION, FP8_TENSOR, FP8_WEIGHTS
from horsepower.runtime import calibration
from horsepower.runtime.calibration import MARGIN, Calibration, calibrated, largest_inputs
from horsepower.runtime.executor import weights_of
from horsepower.runtime.fused import plan_velocity
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.presets import FOAL
from models import TINY, VARIANTS, random_inputs, random_model

CONFIG = replace(TINY, hidden_size=128, head_dim=32)
PRESET = replace(FOAL, num_layers=2, mm_layers=(0,), gelu7_layers=(0,))
WHOLE = [each for each in PASSES if each is not lower]
LEAVES = ("attention.linear_qkv", "attention.linear_proj", "mlp.up_gate_proj", "mlp.down_proj")


def measured(model, scheme, rows=256, steps=1):
    found = Calibration(model, scheme, rows)
    inputs = random_inputs(model.config, 3, 12, 9, 8)
    with torch.no_grad(), found.watching():
        for _ in range(steps):
            model(*inputs, 3)
    return found.errors


def for_inputs_of(model, scheme):
    """The scheme, calibrated if it has to be."""
    if scheme.inputs != "tensor":
        return scheme
    with torch.no_grad(), largest_inputs(model) as largest:
        model(*random_inputs(model.config, 3, 12, 9, 8), 3)
    return calibrated(scheme, largest)


@pytest.mark.parametrize("name", ["default", "post_norm", "per_head"])
@pytest.mark.parametrize("scheme", [FP8, FP8_TENSOR, FP8_WEIGHTS], ids=lambda scheme: scheme.name)
def test_every_layer_of_normal_weights(name, scheme):
    model = random_model(replace(CONFIG, **VARIANTS[name]))
    errors = measured(model, for_inputs_of(model, scheme), steps=2)
    assert list(errors) == [f"block.layers.{i}.{leaf}" for i in range(3) for leaf in LEAVES]
    low, high = (0.033, 0.045) if scheme.inputs else (0.024, 0.03)
    for found in errors.values():
        assert len(found) == 2  # steps
        assert all(low < each.scheme < high and each.own < 0.004 for each in found)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["default", "windowed", "per_head"])
@pytest.mark.parametrize("scheme", [FP8_ATTENTION, replace(FP8_TENSOR, attention=True)], ids=["fp8", "fp8-tensor"])
def test_every_attention_of_normal_weights(name, scheme):
    """Beside the layers, whose errors stay what they are."""
    model = random_model(replace(CONFIG, **VARIANTS[name]))
    scheme = for_inputs_of(model, scheme)
    errors, without = (measured(model, each) for each in (scheme, replace(scheme, attention=False)))
    found = {layer: errors.pop(layer) for layer in [*errors] if layer.endswith(".attention")}
    assert [*found] == [f"block.layers.{i}.attention" for i in range(3)]
    assert errors == without
    assert all(0.02 < each.scheme < 0.06 and each.own < 0.006 for (each,) in found.values())


def test_a_sample_is_close_to_all_rows():
    model = random_model(CONFIG)
    few, every = measured(model, FP8, 16), measured(model, FP8)
    for layer, (error,) in every.items():
        assert few[layer][0].scheme == pytest.approx(error.scheme, rel=0.15)
        assert few[layer] != every[layer]


def test_the_largest_input_is_that_of_all_rows_and_steps():
    model, inputs = random_model(CONFIG), random_inputs(CONFIG, 3, 12, 9, 8)
    steps = [inputs, tuple(3 * x if i < 3 else x for i, x in enumerate(inputs)), inputs]
    seen = {}
    for name, layer in model.named_modules():
        if name.endswith(LEAVES):
            layer.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, []).append(given[0]))
    with torch.no_grad(), largest_inputs(model) as largest:
        for step in steps:
            model(*step, 3)
    assert len(largest) == 12
    scheme = calibrated(FP8_TENSOR, largest)
    assert dict(scheme.largest) == {name: MARGIN * max(float(x.abs().max()) for x in xs) for name, xs in seen.items()}
    largest["block.layers.0.mlp.down_proj"] = torch.tensor(torch.nan)
    with pytest.raises(ValueError, match=r"largest: got nan for block\.layers\.0\.mlp\.down_proj"):
        calibrated(FP8_TENSOR, largest)


def test_the_margin_leaves_normal_values_as_they_are():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    largest = float(x.abs().max())
    near, far = (ops.to_codes(x, 448 / (margin * largest)).float() * margin for margin in (1, MARGIN))
    normal = x.abs() > largest * MARGIN / 2**14
    assert normal.sum() > 4090
    assert torch.equal(near[normal], far[normal])


def executed(plan, weights, given):
    """Every value of a plan, computed call by call with the plain operators."""
    env = {weight.value: weights[weight.name] for weight in plan.weights}
    env |= zip(plan.inputs, given, strict=True)
    for call in (*plan.loads, *plan.calls):
        args, kwargs = pytree.tree_map_only(Ref, lambda ref: env[ref.name], (call.args, dict(call.kwargs)))
        env[call.result] = operator_of(call.target)(*args, **kwargs)
    return env


class Read:
    """What a linear layer of a plan reads: its operands' values, and the call that quantises its rows."""

    def __init__(self, plan, env, call):
        self._env, self._calls = env, {each.result: each for each in (*plan.loads, *plan.calls)}
        self.given = dict(zip(arguments(op_of(call.target).schema), call.args, strict=False))
        at = self.given["weight"].name
        while at in self._calls:
            at = next(self._calls[at].reads)
        self.layer = next(each.name for each in plan.weights if each.value == at).removesuffix(".weight")
        self.made = self._calls[self.given["x"].name]
        while self.made.views or self.made.target == "_operator.getitem":
            self.made = self._calls[next(self.made.reads)]

    def __getitem__(self, name):
        return self._of(self.given.get(name))

    def _of(self, value):
        return pytree.tree_map_only(Ref, lambda ref: self._env[ref.name], value)

    def unquantised(self):
        """The same rows as the model as it is written has them, before whatever quantises."""
        args, kind = self._of(self.made.args), self.made.target.split(".")[1]
        if kind in ("rms_norm_quantise", "to_codes"):
            return args[0]
        if kind in ("add_rms_norm_quantise", "linear_add_rms_norm_quantise"):
            return self._env[self.made.result][0]  # the sum, which the norm reads
        if kind == "attention":
            return ops.attention(*args[:-1]).flatten(1)
        assert kind == "linear_activation", f"{self.layer} is quantised by {self.made.target}"
        x, weight, experts, counts, _, _, *scales = args
        return LINEAR(x, weight, experts, counts, *scales)[0]


def feed(model, path, x, counts):
    """Let a layer of the model read x as if the model ran; behind a norm or an activation, let that read it."""
    owner, leaf = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    if leaf in ("linear_qkv", "up_gate_proj"):
        owner.pre_norm(x, counts)
    elif leaf == "linear_proj":
        owner.linear_proj(x, counts)
    else:
        owner.up_gate_proj.forward = lambda *_: x[:, : owner.up_gate_proj.weight.shape[0] // owner.up_gate_proj.experts]
        owner.up_gate_proj(None, None)
        del owner.up_gate_proj.forward


def compared(model, scheme, monkeypatch, only=WHOLE):
    """Asserts that what a calibration measures is, layer by layer, what the plan multiplies for the same inputs."""
    seen = {}

    def note(rows, weight, experts, scales):
        name = next(name for name, each in model.named_parameters() if each is weight)
        seen[name.removesuffix(".weight")] = rows, quantise(weight, scales).scales
        return ProductError(0.0, 0.0)

    monkeypatch.setattr(calibration, "product_error", note)
    meta = DiT(model.config, device="meta")
    plan = plan_velocity(meta, torch.device("cpu"), False, only, scheme=scheme, target="sm_90")
    video, audio, text, coords = random_inputs(model.config, 3, 5, 4, 6)
    with torch.no_grad():
        condition = model.condition(text, coords)
        env = executed(plan, weights_of(model), (video, audio, *condition, 3))
        calls = [each for each in plan.calls if each.target.startswith("horsepower.linear")]
        read = {
            each.layer: each for each in (Read(plan, env, call) for call in calls) if each["weight_scale"] is not None
        }
        assert len(read) == 4 * model.config.num_layers
        watched = Calibration(model, scheme, 25)

        def run(*_):
            for path, each in read.items():
                x = each.unquantised()
                if scheme.inputs == "tensor":
                    layer = model.get_submodule(path)
                    layer(x[:, : layer.weight.shape[1]], (15, 4, 6))
                else:
                    feed(model, path, x, (15, 4, 6))

        model.block.forward = run
        with watched.watching():
            model.block(video, None, (15, 4, 6), 3)
        del model.block.forward
    for path, each in read.items():
        rows, scales = seen[path]
        assert rows.codes.shape[0] == 25
        codes = each["x"][:, : rows.codes.shape[1]]
        same = (rows.codes.view(torch.uint8) == codes.view(torch.uint8)).float().mean()
        # the model rounds what attention makes to 16 bits, the plan's kernel does not
        assert same > (0.93 if each.made.target == "horsepower.attention.default" else 0.99), path
        if rows.scales is None:
            assert each["x_scale"] is None, path
        else:
            torch.testing.assert_close(rows.scales, each["x_scale"], rtol=1e-5, atol=0)
        made = each["weight_scale"].flatten().sort().values  # padding has scales of zero
        want = (scales * rows.static).flatten().sort().values
        torch.testing.assert_close(made[made > 0], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", [FP8, FP8_TENSOR], ids=lambda scheme: scheme.name)
def test_what_is_measured_is_what_the_plan_multiplies(scheme, monkeypatch):
    """Codes, scales and static scales of each layer of the preset, for the same inputs."""
    model = random_model(PRESET)
    compared(model, for_inputs_of(model, scheme), monkeypatch)


def test_a_quantiser_that_moved_is_seen(monkeypatch):
    only = [each for each in WHOLE if each is not quantise_in_producer]
    with pytest.raises(AssertionError, match=r"linear_qkv is quantised by horsepower\.quantise"):
        compared(random_model(replace(PRESET, num_layers=1)), FP8, monkeypatch, only)


def test_what_is_measured_of_attention_has_the_scales_of_the_plan(monkeypatch):
    """And, fed with what the plan's projection makes, its codes."""
    model, seen = random_model(PRESET), []
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data *= 20  # bounds that differ
    monkeypatch.setattr(calibration, "attention_error", lambda heads, *_: seen.append(heads) or ProductError(0.0, 0.0))
    plan = plan_velocity(
        DiT(PRESET, device="meta"), torch.device("cpu"), False, WHOLE, scheme=FP8_ATTENTION, target="sm_90"
    )
    video, audio, text, coords = random_inputs(PRESET, 3, 5, 4, 6)
    with torch.no_grad():
        condition = model.condition(text, coords)
        env = executed(plan, weights_of(model), (video, audio, *condition, 3))
        with Calibration(model, FP8_ATTENTION, 25).watching():
            model.velocity(video, audio, condition, 3)
    calls = [call for call in plan.calls if call.target == "horsepower.attention.default"]
    assert len(calls) == len(seen) == 2
    for call, heads in zip(calls, seen, strict=True):
        q, k, v, scales = (env[call.args[i].name] for i in (0, 1, 2, -1))
        q_scale, k_scale, v_scale = heads.scales
        assert torch.equal(scales, torch.cat([q_scale * k_scale, v_scale]))
        # The plan's projection is of eight bits, the model's is not; its heads are paired, which scores do not show.
        keys = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k.float() * k_scale, heads.k.float()))
        queries = q.float() * q_scale, heads.q.float()
        scores = [torch.einsum("lhd,mhd->hlm", *pair) for pair in zip(queries, keys, strict=True)]
        values = v.float().permute(2, 0, 1)[: len(heads.v)] * v_scale, heads.v.float()
        for got, want in (scores, values):
            assert (got - want).norm() < 0.15 * want.norm()
