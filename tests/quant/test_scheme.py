"""A scheme of a user's own is refused where it says nothing, not applied in part."""

import re
from dataclasses import replace

import pytest

from horsepower.quant.scheme import FP8, FP8_TENSOR, FP8_WEIGHTS, scheme_of


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("weights", "row", "channel, tensor"),
        ("inputs", "tokens", "token, tensor, None"),
        ("attention", "yes", "False, or True with inputs of eight bits"),
        ("recipe", "delay", "current, block, delayed, None"),
        ("targets", "sm_90", "a tuple"),
        ("targets", ("gpu",), "cpu, sm_80, sm_90"),
        ("keep", "block.layers.0.*", "a tuple"),  # whose letters, one of them a star, would keep every layer
        ("keep", ["block.layers.0.*"], "a tuple"),
        ("largest", {"a": 1.0}, "a tuple"),
    ],
)
def test_fields_that_say_nothing(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field}: got .*, allowed: {allowed}"):
        replace(FP8, **{field: value})


def test_attention_of_eight_bits_over_inputs_of_sixteen():
    with pytest.raises(ValueError, match="attention: got True, allowed: False, or True with inputs of eight bits"):
        replace(FP8_WEIGHTS, attention=True)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e300, 1e-45, "3", None])
def test_calibrated_to_what_float32_cannot_undo(value):
    match = re.escape(f"largest: got {value!r} for a, allowed: a number from 2^-100 to 2^100")
    with pytest.raises(ValueError, match=match):
        FP8_TENSOR.calibrated({"a": value})
    with pytest.raises(ValueError, match=match):
        replace(FP8_TENSOR, largest=(("a", value),))


def test_one_pattern_is_no_list():
    with pytest.raises(ValueError, match=r"keep: got 'a\.\*', allowed: a list of patterns"):
        FP8.keeping("a.*")
    assert FP8.keeping(["a.*"]) == replace(FP8, keep=("a.*",))


@pytest.mark.parametrize("given", [8, ["fp8"], "FP8"])
def test_what_is_no_name(given):
    with pytest.raises(ValueError, match="scheme: got .*, allowed: fp8, fp8-attention, fp8-tensor"):
        scheme_of(given)
