"""`horsepower quantize` on the preset with a model of two layers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from horsepower import Engine, cli, quantizing
from horsepower.bench import clips
from horsepower.quantizing import Options, quantise, read_prompts
from horsepower.runtime.checkpoint import SINGLE
from horsepower.runtime.foal import Foal
from horsepower.runtime.pipeline import Stage
from horsepower.runtime.presets import FOAL_MODELS
from horsepower.runtime.quantised_checkpoint import Stored
from horsepower.runtime.source import open_source

CONFIG = replace(FOAL_MODELS["distill"], num_layers=2, hidden_size=64, head_dim=16, mm_layers=(0,), gelu7_layers=(0,))
ATTENTIONS = ("block.layers.0.attention", "block.layers.1.attention")
UP = "block.layers.1.mlp.up_gate_proj"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two steps of a tiny clip, by two layers; one has an input that eight bits cannot hold by the row."""
    both = FOAL_MODELS | {"distill": CONFIG, "540p_sr": CONFIG}
    monkeypatch.setattr("horsepower.runtime.foal.FOAL_MODELS", both)
    monkeypatch.setattr(quantizing, "SMALL", ((128, 64), 1))
    stages = {"distill": Stage("base", 2, "distilled"), "540p_sr": replace(clips.STAGES["540p_sr"], steps=2)}
    monkeypatch.setattr(clips, "STAGES", clips.STAGES | stages)
    monkeypatch.setattr(clips, "SUPER_RESOLUTION", stages["540p_sr"])
    whole = Foal.weights

    def weights(self, name):
        values = dict(whole(self, name))
        values["block.layers.1.mlp.pre_norm.weight"].data[5] = 1e6
        values[f"{UP}.weight"].data[:, 5] = 0
        return values

    monkeypatch.setattr(Foal, "weights", weights)


def run(**options):
    given = {"prompts": ("a horse", "two horses and a long road to the sea"), **options}
    return quantise("foal", None, Options(**given), "cpu", lambda line: None)


def table(report, title):
    tables = {each["title"]: each["rows"] for each in json.loads(report.json())["tables"]}
    return tables[title]


def test_an_outlier_stays_and_the_checkpoint_runs(tmp_path):
    holds, brief, full = run(output=tmp_path / "quantised", latent_budget=0.5)
    assert holds
    (kept,) = table(brief, "distill: layers that stay in bf16")
    assert (kept["layer"], kept["why"]) == (UP, "over 0.06")
    assert kept["fp8"] > 0.5 > 0.005 > kept["bf16"]
    rows = {row["layer"]: row for row in table(full, "distill: every layer")}
    assert len(rows) == 8
    assert all(0.03 < row["fp8"] < 0.06 and row["kept"] is None for layer, row in rows.items() if layer != UP)
    errors = {row[""]: (row["video"], row["audio"]) for row in table(brief, "distill: final latents")}
    assert set(errors) == {"bf16 against float32", "fp8 against bf16"}
    assert max(errors["bf16 against float32"]) < min(errors["fp8 against bf16"]) < 0.5
    assert "7 of 8 linear layers in eight bits" in brief.text()
    assert "plain operators stood for its kernels" in brief.text()
    said = Stored.of(tmp_path / "quantised" / "distill")
    assert (said.scheme, said.keep, said.budget, said.latent_budget) == ("fp8", (UP,), 0.06, 0.5)
    tensors = load_file(tmp_path / "quantised" / "distill" / SINGLE)
    assert tensors[f"{UP}.weight"].dtype == torch.bfloat16
    stated = sum(x.nbytes for x in tensors.values())
    assert f"{stated / 1e9:.3g} GB instead of" in brief.text()
    engine = Engine.from_pretrained(tmp_path / "quantised", scheme="fp8-weights")
    assert engine.scheme.keep == (UP,)


@pytest.mark.parametrize(("head_dim", "kept"), [(32, {UP}), (16, {UP, *ATTENTIONS})])
def test_attention_is_measured_beside_the_layers(head_dim, kept, tmp_path, monkeypatch):
    """Or kept, where no kernel takes its heads; the checkpoint runs under schemes that leave attention as it is too."""
    config = replace(CONFIG, head_dim=head_dim)
    monkeypatch.setattr("horsepower.runtime.foal.FOAL_MODELS", FOAL_MODELS | {"distill": config})
    _, brief, full = run(scheme="fp8-attention", output=tmp_path / "quantised", latent_budget=1.0)
    rows = {row["layer"]: row for row in table(full, "distill: every layer")}
    assert len(rows) == 10
    assert all(0.01 < rows[name]["fp8-attention"] < 0.06 and rows[name]["bf16"] < 0.006 for name in ATTENTIONS)
    assert {layer for layer, row in rows.items() if row["kept"]} == kept
    assert f"{10 - len(kept)} of 10 linear layers and attentions in eight bits" in brief.text()
    assert Stored.of(tmp_path / "quantised" / "distill").scheme == "fp8-attention"
    engine = Engine.from_pretrained(tmp_path / "quantised", scheme="fp8-weights")
    assert set(engine.scheme.keep) == kept


def test_frozen_scales_are_calibrated_and_written(tmp_path):
    """On a CPU, which cannot run them: by plain operators, and the engine refuses."""
    holds, brief, full = run(scheme="fp8-tensor", output=tmp_path / "quantised", latent_budget=0.5)
    assert holds
    assert "for 2 times the largest value of all rows of all steps" in brief.text()
    assert "plain operators stood for its kernels" in brief.text()
    rows = {row["layer"]: row for row in table(full, "distill: every layer")}
    (kept,) = table(brief, "distill: layers that stay in bf16")
    assert (kept["layer"], kept["why"]) == (UP, "over 0.06")
    assert all(0.03 < row["fp8-tensor"] < 0.06 and row["kept"] is None for layer, row in rows.items() if layer != UP)
    errors = {row[""]: (row["video"], row["audio"]) for row in table(brief, "distill: final latents")}
    assert max(errors["bf16 against float32"]) < min(errors["fp8-tensor against bf16"]) < 0.5
    source = open_source(tmp_path / "quantised", torch.device("cpu"), torch.bfloat16)
    scheme = source.stored("distill").scheme_for(None)
    assert (scheme.name, scheme.keep) == ("fp8-tensor", (UP,))
    assert dict(scheme.largest) == {layer: row["inputs up to"] for layer, row in rows.items() if layer != UP}
    stated = sum(x.nbytes for x in load_file(tmp_path / "quantised" / "distill" / SINGLE).values())
    assert f"{stated / 1e9:.3g} GB instead of" in brief.text()
    with pytest.raises(ValueError, match="scheme: got fp8-tensor for cpu, which cannot compute it"):
        Engine.from_pretrained(tmp_path / "quantised")


def test_the_latent_budget_keeps_the_worst_and_as_few_as_it_needs(monkeypatch):
    asked = []

    def end_to_end(self, keep, plain):
        asked.append(len(keep))
        return 0.1 / (1 + len(keep)), 0.01

    monkeypatch.setattr(quantizing._Measurement, "_end_to_end", end_to_end)
    holds, brief, full = run(scheme="fp8-weights", latent_budget=0.03)
    assert holds
    assert sorted(asked) == [0, 2, 3, 4, 8]
    kept = table(brief, "distill: layers that stay in bf16")
    every = table(full, "distill: every layer")
    worst = sorted(every, key=lambda row: -row["fp8-weights"])[:3]
    assert [row["layer"] for row in kept] == [row["layer"] for row in worst]
    assert {row["why"] for row in kept} == {"latents over 0.03"}
    rows = {row[""]: row["video"] for row in table(brief, "distill: final latents")}
    assert (rows["fp8-weights against bf16"], rows["fp8-weights before more were kept"]) == (0.025, 0.1)
    assert "5 of 8 linear layers in eight bits" in brief.text()


def test_a_latent_budget_that_cannot_be_held(tmp_path, capsys):
    where = tmp_path / "quantised"
    arguments = ("quantize", "--scheme", "fp8-weights", "--latent-budget", "1e-9", "-o", str(where), "--device", "cpu")
    page = tmp_path / "report.html"
    assert cli.main((*arguments, "--html", str(page))) == 1
    assert "CANNOT be held: nothing is written" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [page]
    text = page.read_text()
    assert "<svg" in text
    assert "qkv 0.02" in text  # what the plot says


def test_super_resolution_begins_with_what_the_base_makes():
    holds, brief, _ = run(scheme="fp8-weights", variants=("540p_sr",), latent_budget=9)
    assert holds
    rows = {row[""]: row for row in table(brief, "540p_sr: final latents")}
    assert 0.001 < rows["fp8-weights against bf16"]["video"] < 0.5
    assert rows["fp8-weights against bf16"]["audio"] == 0  # which it only listens to


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int4"}, "scheme: got 'int4', allowed: fp8, fp8-attention, fp8-tensor, fp8-weights"),
        ({"budget": 0.0}, "budget: got 0.0, allowed: a number above 0"),
        ({"latent_budget": float("nan")}, "latent_budget: got nan"),
        ({"prompts": ()}, "calibrate: got no prompts"),
        ({"variants": ("huge",)}, "variant: got 'huge', allowed: base, distill"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_prompts_are_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a horse\n\n  ein Pferd über Land \n", encoding="utf-8")
    assert read_prompts(str(file)) == ("a horse", "ein Pferd über Land")
    file.write_bytes(b"\xff\xfe")
    for path in (file, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="calibrate: got .*, allowed: a text file"):
            read_prompts(str(path))


def test_an_output_that_exists_is_refused_before_the_work(tmp_path):
    with pytest.raises(ValueError, match="output: got .*, which exists"):
        Options(output=tmp_path)
