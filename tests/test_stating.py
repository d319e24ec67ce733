"""What the released models take on one GPU, for the longest prompt: 15 B parameters are planned without memory."""

import json
import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from horsepower import Request
from horsepower.quant.scheme import FP8, FP8_WEIGHTS
from horsepower.runtime import memory
from horsepower.runtime.presets import MODELS
from horsepower.runtime.released import ReleasedSizes
from horsepower.runtime.turns import GB, state
from horsepower.stating import Options, parts_of, stated

HOST = 128 * GB
SCHEMES = {"bfloat16": None, "fp8": FP8}


def request(resolution):
    return Request(prompt="a horse", resolution=resolution, duration=5)


@cache
def needed(resolution, scheme):
    return parts_of(Options(request(resolution), scheme=SCHEMES[scheme]))


@pytest.mark.parametrize(
    ("resolution", "scheme"),
    [("256p", "bfloat16"), ("1080p", "bfloat16"), ("256p", "fp8"), ("1080p", "fp8")],
)
def test_the_whole_engine_fits_40_gb(scheme, resolution):
    """Base and super-resolution take turns; the text encoder and the idle model wait on the host."""
    parts, _ = needed(resolution, scheme)
    made = state(*needed(resolution, scheme), 40 * GB, HOST)
    assert made.peak <= 40 * GB
    assert made.host_peak <= HOST
    if scheme != "bfloat16":  # some parts can stay
        assert all(parts[name].bytes <= 15.6 * GB for name in parts if name in MODELS)
        return
    for turn in made.turns:
        models = [name for name in turn.device if name in MODELS]
        assert turn.phase == "text" or "text encoder" in turn.host
        assert len(models) <= (turn.phase in ("base", "super-resolution"))
    phases = [turn.phase for turn in made.turns]
    assert phases == ["text", "base", *(["super-resolution"] if resolution == "1080p" else []), "video", "audio"]


def test_weights_are_near_those_of_the_module():
    """The recipes pad 13652 columns to 13696, and fold norms."""
    parts, _ = needed("1080p", "bfloat16")
    raw = memory.weight_bytes(MODELS["base"], torch.bfloat16)
    for name in ("distill", "1080p_sr"):
        assert 0.999 * raw < parts[name].bytes < 1.01 * raw
        assert parts[name].load <= parts[name].bytes + 300 * 2**20  # no two of its weights beside the finished ones


def test_the_price_of_a_keep_list_is_stated(monkeypatch):
    """Of a model as wide as the released ones: 12 matrices of 20480 x 5120, a byte a weight more."""
    config = replace(MODELS["distill"], num_layers=4, mm_layers=(0, 1, 2, 3))
    monkeypatch.setattr(ReleasedSizes, "config", lambda self, name: config)
    scheme = FP8_WEIGHTS.keeping(["block.layers.[0-3].mlp.down_proj"])
    text = stated(Options(request("256p"), target="sm_80", scheme=scheme)).text()
    said = re.search(r"Weights of distill: (.*) GB; (.*) GB if nothing were kept as block.layers.\[0-3\].mlp", text)
    kept, least = map(float, said.groups())
    assert kept - least == pytest.approx(12 * 20480 * 5120 / GB, abs=0.011)
    with pytest.raises(ValueError, match="scheme: got fp8 for sm_80"):
        Options(request("256p"), target="sm_80", scheme=FP8)


def test_the_text_encoder_is_18_gb():
    parts, phases = needed("256p", "bfloat16")
    assert parts["text encoder"].bytes == pytest.approx(18.48 * GB, rel=0.001)
    assert phases[0].activations["text encoder"] == pytest.approx(3.0 * GB, rel=0.01)


def test_the_report():
    report = stated(Options(request("256p")), 40 * GB)
    (table,) = json.loads(report.json())["tables"]
    rows = {row["phase"]: row for row in table["rows"]}
    made = state(*needed("256p", "bfloat16"), 40 * GB, HOST)
    assert [row["sum"] for row in rows.values()] == [turn.peak / GB for turn in made.turns]
    assert rows["base"]["on the host"] == made.turns[0].device["text encoder"] / GB
    assert rows["text"]["distill"] is None
    assert "In turns: text encoder, distill." in report.text()
    assert "All parts stay once they are loaded." in stated(Options(request("256p")), 80 * GB).text()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"target": "cpu"}, "target"),
        ({"model": "540p_sr"}, "model"),
        ({"folder": "/nowhere"}, "folder"),
        ({"folder": "/"}, "model"),
    ],
)
def test_what_is_not_known_is_refused(options, field):
    with pytest.raises(ValueError, match=f"^{field}: got .*, allowed: "):
        parts_of(Options(request("256p"), **options))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="device_memory: got 20000000000 bytes, allowed: at least 3.*; .* are missing"):
        stated(Options(request("256p")), 20 * GB)
