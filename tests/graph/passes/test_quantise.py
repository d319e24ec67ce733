"""Schemes applied: which layers become codes, who quantises what they read, and how far it leads from float64."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from horsepower.graph.passes import PASSES
from horsepower.kernels.ops import ops
from horsepower.quant.scheme import FP8, FP8_TENSOR, FP8_WEIGHTS, SCHEMES, Scheme, scheme_of
from horsepower.runtime.calibration import largest_inputs
from horsepower.runtime.compiled import compile
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit import Linear as DiTLinear
from models import DYNAMIC, TINY, VARIANTS, random_inputs, random_model
from recordings import relative_error

# Fused operators stay whole: they run as their references do.
WHOLE = [each for each in PASSES if each.__name__ != "lower"]
CONFIG = replace(TINY, hidden_size=128, head_dim=32)


def run(model, scheme, target="sm_90", expect=None):
    example = (*random_inputs(model.config, 3, 2, 5, 4), 3)
    return compile(
        model, example, dynamic_shapes=DYNAMIC, target=target, scheme=scheme, only=WHOLE, cache=False, expect=expect
    )


def calls(plan, *names):
    """Calls of these operators in each run."""
    return [call for call in plan.calls if call.target.removeprefix("horsepower.").removesuffix(".default") in names]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_is_quantised_and_every_input_where_it_is_made(name):
    model = random_model(replace(CONFIG, **VARIANTS[name]))
    plan = run(model, "fp8", expect={"quantise": 12, "quantise_in_producer": 12}).plan
    assert not calls(plan, "quantise")
    assert [call.target for call in plan.loads].count("horsepower.quantise.default") == 12
    kept = {site.refused for site in plan.sites if site.rewrite == "quantise" and site.refused}
    assert kept == {"its weight is torch.float32", "it has a bias"}  # the heads, the embedders


def test_weights_alone():
    plan = run(random_model(CONFIG), "fp8-weights", "cpu", {"quantise": 12}).plan
    assert not any(site.rewrite == "quantise_in_producer" for site in plan.sites)
    assert not calls(plan, "quantise")
    bf16 = run(random_model(CONFIG), None, "cpu").plan
    scales = 4 * sum(p.shape[0] for m in DiT(CONFIG).modules() if isinstance(m, DiTLinear) for p in m.parameters())
    codes = sum(p.numel() for m in DiT(CONFIG).modules() if isinstance(m, DiTLinear) for p in m.parameters())
    assert plan.weight_bytes == bf16.weight_bytes - codes + scales


def test_the_keep_list_keeps():
    scheme = FP8.keeping(["block.layers.1.*", "block.layers.*.mlp.down_proj"])
    plan = run(random_model(CONFIG), scheme).plan
    reasons = [site.refused for site in plan.sites if site.rewrite == "quantise"]
    assert reasons.count("kept: block.layers.1.*") == 4
    assert reasons.count("kept: block.layers.*.mlp.down_proj") == 2
    assert reasons.count(None) == 6
    assert not calls(plan, "quantise")  # what feeds kept layers alone stays as it was


def test_a_pattern_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^keep: got 'blok\.\*', allowed: patterns of layers, such as \['adapt"):
        run(random_model(CONFIG), FP8.keeping(["block.layers.1.*", "blok.*"]))


def test_a_scheme_that_is_not_calibrated_is_refused():
    with pytest.raises(ValueError, match="^scheme: got fp8-tensor as it is, allowed: calibrated"):
        run(random_model(CONFIG), "fp8-tensor")


def faithful(model, dtype=torch.float64):
    """A twin in float64."""
    twin = DiT(replace(model.config, params_dtype=dtype), dtype)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def back(codes, scales):
    return codes.double() * scales


@pytest.mark.parametrize(("name", "target"), [("default", "cpu"), ("windowed", "sm_80"), ("post_norm", "sm_90")])
def test_weights_alone_give_the_model_of_the_rounded_weights(name, target):
    """Whatever recipes move the rows: beside float64 of the dequantised weights there is the rounding of bfloat16."""
    model = random_model(replace(CONFIG, **VARIANTS[name]))
    rounded = faithful(model)
    for module in rounded.modules():
        if isinstance(module, DiTLinear):
            module.weight.data = back(*ops.quantise(module.weight.data))
    given = random_inputs(CONFIG, 3, 3, 2, 5)
    with torch.no_grad():
        want = rounded(*(x.double() for x in given), 3)
        got, eager = run(model, "fp8-weights", target)(*given, 3), model(*given, 3)
        true = faithful(model)(*(x.double() for x in given), 3)
    for one, wanted, plain, exact in zip(got, want, eager, true, strict=True):
        assert relative_error(one, wanted) < 2 * relative_error(plain, exact)
        assert relative_error(one, exact) > 2 * relative_error(one, wanted)


class Quantised(nn.Module):
    """A layer whose weight and input are rounded by the row, as libraries do it, in float64."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.weight = layer.weight
        layer.weight.data = back(*ops.quantise(layer.weight.data))

    def forward(self, x, counts):
        return self.layer(back(*ops.quantise(x)), counts)


@pytest.mark.parametrize("name", ["default", "windowed", "post_norm", "per_head"])
def test_static_scales_cost_nothing(name):
    """The plan is as near to float64 as a model whose rows all have scales of their own."""
    model = random_model(replace(CONFIG, **VARIANTS[name]))
    exact, rows = faithful(model), faithful(model)
    for module in [each for each in rows.modules() if hasattr(each, "linear_qkv") or hasattr(each, "down_proj")]:
        for child, layer in list(module.named_children()):
            if isinstance(layer, DiTLinear):
                setattr(module, child, Quantised(layer))
    plan, given = run(model, "fp8"), random_inputs(CONFIG, 3, 7, 5, 9)
    with torch.no_grad():
        true, simulated = (each(*(x.double() for x in given), 3) for each in (exact, rows))
        got = plan(*given, 3)
    for one, other, want in zip(got, simulated, true, strict=True):
        assert relative_error(one, want) < 1.2 * relative_error(other, want) < 0.2


def largest_of(model, given):
    with torch.no_grad(), largest_inputs(model) as found:
        model(*given, 3)
    return {layer: float(value) for layer, value in found.items()}


def test_scales_of_whole_tensors_are_calibrated_and_frozen():
    model, given = random_model(CONFIG), random_inputs(CONFIG, 3, 7, 5, 9)
    largest = largest_of(model, given)
    scheme = FP8_TENSOR.calibrated(largest)
    got = run(model, scheme, expect={"quantise": 12, "pad_qkv": 3})
    assert len(calls(got.plan, "to_codes")) == 12
    with torch.no_grad():
        true = faithful(model)(*(x.double() for x in given), 3)
        first, alone = got(*given, 3), got(*(10 * x for x in given[:3]), given[3], 3)
        again = got(*given, 3)
    assert all(map(torch.equal, first, again))  # nothing stays of what came between
    assert all(x.isfinite().all() for x in alone)  # what is larger than it was calibrated for saturates
    for one, want in zip(first, true, strict=True):
        assert relative_error(one, want) < 0.2
    del largest["block.layers.1.mlp.down_proj"]
    plan = run(model, FP8_TENSOR.calibrated(largest)).plan
    assert [site.refused for site in plan.sites].count("its input was not calibrated") == 1
    with pytest.raises(ValueError, match=r"largest: got nan for a, allowed: a number from 2\^-100 to 2\^100"):
        FP8_TENSOR.calibrated({"a": float("nan")})


@pytest.mark.parametrize(("weights", "inputs"), [("tensor", None), ("tensor", "token"), ("channel", "tensor")])
def test_what_shares_a_scale_is_free_to_choose(weights, inputs):
    model, given = random_model(CONFIG), random_inputs(CONFIG, 3, 7, 5, 9)
    scheme = Scheme("own", "one's own", ("sm_90",), weights=weights, inputs=inputs)
    got = run(model, scheme.calibrated(largest_of(model, given)), expect={"quantise": 12})(*given, 3)
    with torch.no_grad():
        for one, want in zip(got, model(*given, 3), strict=True):
            assert 0.01 < relative_error(one, want) < 0.2


def test_a_weight_that_is_shared_by_one_expert_and_by_three_has_scales_for_each():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(96, 32, generator=torch.Generator().manual_seed(0)).bfloat16())

        def forward(self, x):
            parts = zip(x.split((1, 2, 3)), self.weight.chunk(3), strict=True)
            return torch.cat([nn.functional.linear(*part) for part in parts]), nn.functional.linear(x, self.weight)

    module, x = Shared(), torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    scheme = FP8_TENSOR.calibrated({"weight": float(x.abs().max())})
    run = compile(module, (x,), target="sm_90", scheme=scheme, only=WHOLE, cache=False, expect={"quantise": 2})
    with torch.no_grad():
        for one, want in zip(run(x), module(x), strict=True):
            assert 0.01 < relative_error(one, want) < 0.1


class Tail(nn.Module):
    """A projection of what `body` makes of x."""

    def __init__(self, body, width=32, columns=32, dtype=torch.bfloat16):
        super().__init__()
        self.body = body
        self.weight = nn.Parameter(torch.randn(width, columns).to(dtype))
        self.gain = nn.Parameter(torch.ones(columns))

    def forward(self, x):
        return nn.functional.linear(self.body(self, x), self.weight)


def sites(module, x, scheme="fp8", target="sm_90"):
    plan = compile(module, (x,), target=target, scheme=scheme, only=WHOLE, cache=False).plan
    return [(site.rewrite, site.refused) for site in plan.sites if "quanti" in site.rewrite], plan


def test_an_input_that_nobody_quantises_is_quantised_apart_and_it_is_said_why():
    x = torch.randn(6, 32, dtype=torch.bfloat16)
    found, plan = sites(Tail(lambda self, x: x.relu()), x)
    assert found == [("quantise", None), ("quantise_in_producer", "aten.relu.default has no kernel that quantises")]
    assert len(calls(plan, "quantise")) == 1


def test_an_input_that_others_read_is_quantised_apart():
    def body(self, x):
        normed = nn.functional.rms_norm(x, (32,), None, 1e-6)
        self.seen = normed
        return normed

    class Both(Tail):
        def forward(self, x):
            made = super().forward(x)
            return made, self.seen.sum()

    found, plan = sites(Both(body), torch.randn(6, 32, dtype=torch.bfloat16))
    assert found[1] == ("quantise_in_producer", "aten.sum.default reads its input too")
    assert len(calls(plan, "quantise")) == 1


@pytest.mark.parametrize(
    ("module", "x", "reason"),
    [
        (Tail(lambda self, x: x, columns=24), torch.randn(6, 24), "its 24 columns are no multiple of 16"),
        (Tail(lambda self, x: x), torch.randn(2, 6, 32), "its input has 3 dimensions"),
        (Tail(lambda self, x: x, dtype=torch.float16), torch.randn(6, 32), "its weight is torch.float16"),
        (Tail(lambda self, x: x, dtype=torch.float32), torch.randn(6, 32), "its weight is torch.float32"),
        (nn.Linear(32, 32, dtype=torch.bfloat16), torch.randn(6, 32), "it has a bias"),
    ],
)
def test_what_is_not_quantised(module, x, reason):
    x = x.to(module.weight.dtype)
    assert sites(module, x)[0] == [("quantise", reason)]
    with torch.no_grad():
        torch.testing.assert_close(
            compile(module, (x,), target="sm_90", scheme="fp8", only=WHOLE, cache=False)(x), module(x)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_alone_are_quantised_for_a_batch_on_the_cpu(dtype):
    module, x = Tail(lambda self, x: x.relu(), dtype=dtype), torch.randn(3, 6, 32).to(dtype)
    run = compile(module, (x,), scheme="fp8-weights", cache=False, expect={"quantise": 1})
    rounded = {"weight": back(*ops.quantise(module.weight.detach())).to(dtype)}
    with torch.no_grad():
        assert relative_error(run(x), torch.func.functional_call(module, rounded, (x,))) < 0.01
        assert relative_error(run(x), module(x)) > 0.01


@pytest.mark.parametrize("target", ["cpu", "sm_80"])
def test_a_scheme_that_the_target_cannot_compute(target):
    with pytest.raises(
        ValueError, match=f"scheme: got fp8 for {target}, which cannot compute it, allowed: fp8-weights"
    ):
        run(random_model(TINY), "fp8", target)


def test_schemes_by_name():
    assert scheme_of(None) is None
    assert [scheme_of(name) for name in SCHEMES] == [*SCHEMES.values()]
    own = Scheme("own", "mine", ("sm_90",), keep=("*.down_proj",))
    assert scheme_of(own) is own
    assert FP8_WEIGHTS.keeping(["a.*"]).keeps("a.b") == "a.*"
    assert FP8_WEIGHTS.keeps("a.b") is None
    with pytest.raises(ValueError, match="scheme: got 'fp4', allowed: fp8, fp8-attention, fp8-tensor, fp8-weights"):
        scheme_of("fp4")
