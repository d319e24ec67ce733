"""Bad requests are refused where they are made, by the name of the field."""

import math

import pytest
import torch

from horsepower import Request, Result
from horsepower.runtime.request import MAX_CHARACTERS, Timings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", " \n\t"),
        ("prompt", "x" * (MAX_CHARACTERS + 1)),
        ("prompt", "a\0b"),
        ("prompt", "a\ud800b"),
        ("prompt", b"bytes"),
        ("prompt", None),
        ("resolution", "720p"),
        ("resolution", (31, 256)),
        ("resolution", (448, 0)),
        ("resolution", (-448, 256)),
        ("resolution", (10**9, 256)),
        ("resolution", (448.0, 256)),
        ("resolution", (448, 256, 3)),
        ("resolution", [448, 256]),
        ("resolution", (True, 256)),
        ("duration", 0),
        ("duration", -1),
        ("duration", math.nan),
        ("duration", math.inf),
        ("duration", 1e9),
        ("duration", "5"),
        ("duration", True),
        ("num_inference_steps", 0),
        ("num_inference_steps", -8),
        ("num_inference_steps", 8.0),
        ("num_inference_steps", math.nan),
        ("num_inference_steps", 10**9),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("guidance", math.nan),
        ("guidance", -1.0),
        ("negative_prompt", ""),
        ("sampler", "euler"),
        ("speech_text", "hello"),
        ("keep_audio", True),
        ("keep_audio", "no"),
        ("image", 5),
        ("image", b"x"),
        ("audio", 5),
        ("super_resolution_guidance", -1),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value):
    named = "speech_language" if field == "speech_text" else field
    with pytest.raises(ValueError, match=rf"^{named}: got .*, allowed: "):
        Request(**{"prompt": "a horse", field: value})


@pytest.mark.parametrize("field", ["duration", "guidance", "seed", "num_inference_steps"])
@pytest.mark.parametrize("digits", [400, 5000])
def test_a_huge_integer_is_refused_in_few_words(field, digits):
    with pytest.raises(ValueError, match=rf"^{field}: got ") as error:
        Request(prompt="a horse", **{field: 10**digits})
    assert len(str(error.value)) < 200


def test_a_long_value_is_not_repeated_in_the_message():
    with pytest.raises(ValueError, match="prompt: got 200000 characters") as error:
        Request(prompt="x" * 200_000)
    assert len(str(error.value)) < 200


def test_speech():
    Request(prompt="a horse", speech_text="Hello!", speech_language="en")
    with pytest.raises(ValueError, match=r"^speech_language: got 'tlh', allowed: en, zh, yue, ja, ko, de, fr"):
        Request(prompt="a horse", speech_text="Hello!", speech_language="tlh")
    with pytest.raises(ValueError, match=r"^speech_language: got \[\]"):
        Request(prompt="a horse", speech_text="Hello!", speech_language=[])
    with pytest.raises(ValueError, match=r"^speech_text: got None"):
        Request(prompt="a horse", speech_language="en")
    with pytest.raises(ValueError, match=r"^speech_text: .*Dialogue: part"):
        Request(prompt='Dialogue:\n<A, English>: "hi"', speech_text="Hello!", speech_language="en")


def test_what_is_allowed_is_allowed():
    Request(prompt="馬" * MAX_CHARACTERS, resolution=(32, 8192), duration=0.2, num_inference_steps=1, seed=2**63 - 1)
    Request(prompt="a horse", duration=60, guidance=1, negative_prompt="rain", sampler="sde", resolution="1080p")


def test_results_are_equal_by_their_bits():
    def result(value, seconds):
        return Result(torch.full((1, 2, 2, 3), value, dtype=torch.uint8), torch.zeros(4, 2), 25, 44100, 0,
                      Timings({"base": seconds}, 0))  # fmt: skip

    assert result(1, 1.0) == result(1, 2.0)
    assert result(1, 1.0) != result(2, 1.0)
    assert result(1, 1.0).size == (2, 2)
