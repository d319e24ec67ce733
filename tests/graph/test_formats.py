"""What is said of each linear layer is what its calls do."""

from dataclasses import replace

from horsepower.graph import passes
from horsepower.graph.capture import capture
from horsepower.graph.formats import formats
from horsepower.graph.passes import PASSES
from horsepower.quant.scheme import FP8, FP8_ATTENTION, FP8_TENSOR, FP8_WEIGHTS
from horsepower.runtime.fused import VELOCITY_SHAPES, velocity_example
from models import TINY, random_model

WHOLE = [each for each in PASSES if each.__name__ != "lower"]
CONFIG = replace(TINY, hidden_size=128, head_dim=32)
LAYERS = ("attention.linear_qkv", "attention.linear_proj", "mlp.up_gate_proj", "mlp.down_proj")


def found(scheme, target="sm_90", only=WHOLE):
    model = random_model(CONFIG)
    captured = capture(model, velocity_example(model), None, VELOCITY_SHAPES, "velocity")
    return formats(passes.run(replace(captured, target=target, scheme=scheme), only))


def of_block(each, block=1):
    return {one.layer: one for one in each if one.block == f"block.layers.{block}"}


def test_inputs_are_quantised_by_what_makes_them():
    each = of_block(found(FP8.keeping(["*.1.mlp.up_gate_proj"])))
    assert tuple(each) == LAYERS
    said = [(each[name].weight, each[name].input, each[name].scales, each[name].quantiser) for name in LAYERS]
    assert said == [
        ("e4m3", "e4m3", "by token", "linear_add_rms_norm_quantise"),
        ("e4m3", "e4m3", "static", "attention"),
        ("bfloat16", "bfloat16", "", ""),
        ("e4m3", "e4m3", "static", "linear_activation"),
    ]
    assert each["mlp.up_gate_proj"].kept == "kept: *.1.mlp.up_gate_proj"


def test_attention_is_spoken_of_where_the_scheme_has_it_in_eight_bits():
    assert "attention" not in of_block(found(FP8))
    for only in (WHOLE, PASSES):
        each = found(FP8_ATTENTION.keeping(["block.layers.0.*"]), only=only)
        one, kept = (of_block(each, block)["attention"] for block in (1, 0))
        maker = "linear_qk_norm_rope" if only is WHOLE else "qk_norm_rope"  # heads of 32 are not for the fused kernel
        assert (one.call, one.weight, one.input, one.scales) == ("attention", "", "e4m3", "static")
        assert (one.quantiser, one.kept) == (f"{maker}, transpose_to_codes", "")
        assert (kept.input, kept.scales, kept.quantiser) == ("bfloat16", "", "")
        assert kept.kept == "kept: block.layers.0.*"


def test_what_the_cpu_computes_is_read_off_the_lowered_graph():
    each = found(FP8_WEIGHTS, "cpu", PASSES)
    assert {(one.weight, one.input, one.call) for one in each if one.block} == {("e4m3", "bfloat16", "linear")}
    assert {one.layer for one in each if not one.block} >= {"final_linear_video", "adapter.video_embedder"}
    assert all(one.weight == "float32" and one.kept for one in each if not one.block)


def test_what_is_said_to_be_kept_is_why():
    """And not only that the weight is what it was; on the lowered graph too."""
    names = [f"block.layers.{i}.{layer}" for i in range(3) for layer in LAYERS]
    calibrated = FP8_TENSOR.calibrated(dict.fromkeys(names[1:], 1.0))
    for scheme, target, only in ((FP8_WEIGHTS, "cpu", PASSES), (calibrated, "sm_90", WHOLE)):
        each = {f"{one.block}.{one.layer}".lstrip("."): one.kept for one in found(scheme, target, only)}
        assert each["adapter.video_embedder"] == "it has a bias"
        assert each["final_linear_video"] == "its weight is torch.float32"
    assert each[names[0]] == "its input was not calibrated"


def test_calibrated_scales_and_no_scheme():
    names = [f"block.layers.{i}.{layer}" for i in range(3) for layer in LAYERS]
    each = of_block(found(FP8_TENSOR.calibrated(dict.fromkeys(names, 1.0))))
    assert {(one.input, one.scales, one.quantiser) for one in each.values()} == {("e4m3", "static", "to_codes")}
    assert not any(one.kept for one in found(None))
