"""A folder in the released layout, from download to clip."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from horsepower import Engine, Request, quantizing
from horsepower.bench import clips
from horsepower.quant.scheme import SCHEMES
from horsepower.runtime import memory
from horsepower.runtime.convert import convert
from horsepower.runtime.models import audio_vae, wan_vae
from horsepower.runtime.quantised_checkpoint import scales_of
from horsepower.runtime.released import ReleasedFolder
from horsepower.runtime.tokens import Grid
from horsepower.stating import Options, stated
from tiny_release import write_release

CPU, BF16 = torch.device("cpu"), torch.bfloat16
REQUEST = {"prompt": "the red cat walks on the wall", "duration": 0.6, "num_inference_steps": 2}


@pytest.fixture(scope="session")
def downloaded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "magi"
    write_release(folder)
    return folder


@pytest.fixture(scope="session")
def converted(downloaded, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "magi"
    shutil.copytree(downloaded, folder)
    for pickle in ("turbo_vae/checkpoint-340000.ckpt", "Wan2.2-TI2V-5B/Wan2.2_VAE.pth"):
        convert(folder / pickle)
        (folder / pickle).unlink()
    return folder


@pytest.fixture
def copy(converted, tmp_path) -> Path:
    shutil.copytree(converted, tmp_path / "magi")
    return tmp_path / "magi"


@pytest.mark.parametrize("model", ["distill", "base"])
def test_text_to_video(converted, model):
    result = Engine.from_pretrained(converted, model).run(Request(resolution=(96, 64), **REQUEST))
    assert result.video.shape == (13, 64, 96, 3)
    assert result.audio.shape == (16 * 1764, 2)
    assert not result.notes


def test_all_parts_in_one_clip(converted, tmp_path):
    from PIL import Image

    Image.new("RGB", (200, 100), "red").save(tmp_path / "red.png")
    engine = Engine.from_pretrained(converted)
    for resolution, stage in (((480, 512), "super-resolution"), ((96, 64), "base")):
        result = engine.run(Request(resolution=resolution, image=tmp_path / "red.png", **REQUEST))
        assert result.size == resolution
        assert stage in result.timings.stages


def test_a_quantised_model_beside_the_other_parts(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizing, "REAL", ((128, 64), 1))
    monkeypatch.setattr(clips, "STAGES", {name: replace(stage, steps=1) for name, stage in clips.STAGES.items()})
    where = tmp_path / "quantised"
    options = quantizing.Options("fp8-weights", ("distill",), ("the cat sings",), output=where)
    holds, report, _ = quantizing.quantise(None, str(converted), options, "cpu", lambda line: None)
    assert holds
    assert "20 of 20 linear layers" in report.text()
    assert {path.name: path.is_symlink() for path in where.iterdir()} == {
        path.name: path.name != "distill" for path in converted.iterdir()
    }
    engine = Engine.from_pretrained(where)
    assert engine.scheme == SCHEMES["fp8-weights"]
    assert engine.run(Request(resolution=(96, 64), **REQUEST)).video.any()
    names = (scales_of(engine._planned(name)[1]) for name in ("distill", "540p_sr"))
    assert [*map(len, names)] == [20, 0]
    with pytest.raises(ValueError, match="variant: got distill, which is quantised already"):
        quantizing.quantise(None, str(where), quantizing.Options("fp8-weights"), "cpu", lambda line: None)


def test_the_parts_hold_the_files_values(converted):
    source = ReleasedFolder(converted, CPU, BF16)
    files = sorted((converted / "distill").glob("*.safetensors"))
    state = {key: value for file in files for key, value in load_file(file).items()}
    dit = source.weights("distill")
    assert all(torch.equal(dit[key], value.to(dit[key].dtype)) for key, value in state.items())
    assert source.config("1080p_sr").local_attn_layers == (0, 1, 2, 4)
    wan = load_file(converted / "Wan2.2-TI2V-5B" / "Wan2.2_VAE.safetensors")
    halves = [source._wan(half).state_dict() for half in ("encoder", "decoder")]
    assert not set(halves[0]) & set(halves[1])
    vae = halves[0] | halves[1]
    assert len(vae) == len(wan)
    assert all(torch.equal(vae[wan_vae.rename(key)], value.to(BF16)) for key, value in wan.items())


def test_sizes_are_known_before_parts_are_read(converted, copy):
    shutil.rmtree(copy / "turbo_vae")
    grid, source, wan = Grid(2, 4, 4, 5), ReleasedFolder(converted, CPU, BF16), ReleasedFolder(copy, CPU, BF16)
    encoder = source.text_encoder()
    assert source.text_width() == encoder.width
    for known, module in (
        (source.text_memory(), encoder.model),
        (source.image_memory((64, 32)), source.image_encoder()._vae),
        (source.video_memory(grid), source.video_decoder()._decoder),
        (wan.video_memory(grid), wan.video_decoder()._vae),
        (source.audio_memory(5, True), source.audio_codec()._vae),
    ):
        assert known.weights == memory.module_bytes(module)
        assert known.activations > 0


def test_the_folder_is_stated_without_being_read(converted, monkeypatch):
    monkeypatch.setattr(ReleasedFolder, "weights", None)
    request = Request(resolution="540p", **REQUEST)
    text = stated(Options(request, folder=str(converted)), 10**9).text()
    assert f"Memory of a clip of 0.6 s at 896x512 on sm_90, {converted}" in text
    assert "All parts stay once they are loaded." in text


def test_diffusers_folders_are_taken_as_they_are(converted, copy):
    source = ReleasedFolder(converted, CPU, BF16)
    latents = torch.randn(1, 48, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sound = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    shutil.rmtree(copy / "turbo_vae")
    want_pixels = list(ReleasedFolder(copy, CPU, BF16).video_decoder()(latents))
    want_wave = source.audio_codec().decode(sound)
    wan = wan_vae.build("cpu", BF16, encoder_width=8, decoder_width=8)
    state = load_file(converted / "Wan2.2-TI2V-5B" / "Wan2.2_VAE.safetensors")
    wan.load_state_dict({wan_vae.rename(key): value for key, value in state.items()})
    audio, prefix = (
        audio_vae.build("cpu", encoder_width=4, decoder_width=4, multipliers=(1,) * 5),
        "pretransform.model.",
    )
    state = load_file(converted / "stable-audio-open-1.0" / "model.safetensors")
    ours = {audio_vae.rename(k.removeprefix(prefix)): x for k, x in state.items() if k.startswith(prefix)}
    audio.load_state_dict({key: ours[key].reshape(x.shape) for key, x in audio.state_dict().items()})
    for part, vae in (("Wan2.2-TI2V-5B", wan), ("stable-audio-open-1.0", audio)):
        shutil.rmtree(copy / part)
        vae.save_pretrained(copy / part / "vae")
    again = ReleasedFolder(copy, CPU, BF16)
    assert torch.equal(next(iter(again.video_decoder()(latents))), want_pixels[0])
    assert torch.equal(again.audio_codec().decode(sound), want_wave)


def test_a_folder_of_the_reference_shape_needs_no_config(copy):
    (copy / "base" / "config.json").unlink()
    source = ReleasedFolder(copy, CPU, BF16)
    assert source.config("base").hidden_size == 5120
    with pytest.raises(ValueError, match=r"checkpoint .*base: is missing block\.layers"):
        source.weights("base")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("distill", None),
        ("t5gemma-9b-9b-ul2", "folder: got .* without t5gemma-9b-9b-ul2"),
        ("stable-audio-open-1.0", "folder: got .* without stable-audio-open-1.0"),
        ("turbo_vae", None),
        ("540p_sr", "resolution: got '540p', which needs the model 540p_sr"),
    ],
)
def test_a_missing_part_is_named_when_it_is_needed(copy, part, message):
    shutil.rmtree(copy / part)
    resolution = "540p" if part == "540p_sr" else (64, 32)

    def run():
        return Engine.from_pretrained(copy).run(Request(resolution=resolution, **REQUEST))

    if message is None:  # base steps in for distill, and Wan's decoder for Turbo's
        assert run().video.any()
    else:
        with pytest.raises(ValueError, match=message):
            run()


def test_a_pickle_is_refused_with_the_way_out(downloaded):
    source = ReleasedFolder(downloaded, CPU, BF16)
    with pytest.raises(ValueError, match=r"checkpoint-340000\.ckpt, which is a pickle, .*`horsepower convert "):
        source.video_decoder()
    with pytest.raises(ValueError, match=r"Wan2\.2_VAE\.pth, which is a pickle"):
        source.image_encoder()


def test_no_model_at_all(tmp_path):
    with pytest.raises(ValueError, match="model: got neither in .*, allowed: distill, base"):
        Engine.from_pretrained(tmp_path)


def test_broken_parts_name_their_file(copy):
    turbo = next((copy / "turbo_vae").glob("*.safetensors"))
    state = load_file(turbo)
    del state["decoder.conv_in.conv.bias"]
    save_file(state, turbo)
    source = ReleasedFolder(copy, CPU, BF16)
    with pytest.raises(ValueError, match=r"checkpoint .*turbo_vae.*: is missing decoder.conv_in.conv.bias, allowed"):
        source.video_decoder()
    (copy / "stable-audio-open-1.0" / "model_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"missing in the configuration"):
        source.audio_codec()
    (copy / "stable-audio-open-1.0" / "model_config.json").write_text('{"model": null}')
    with pytest.raises(ValueError, match=r"^model\..*: missing in the configuration"):
        source.audio_codec()
    (copy / "base" / "config.json").write_text('{"head_dim": 7}')
    with pytest.raises(ValueError, match=r"head_dim, num_query_groups: got 7"):
        source.config("base")


@pytest.mark.parametrize(
    "fault",
    [
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
        lambda folder: os.truncate(folder / "model.safetensors", 3000),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: poison(folder / "model.safetensors", "model.encoder.norm.weight"),
    ],
)
def test_a_broken_text_encoder_is_a_value_error(copy, fault):
    fault(copy / "t5gemma-9b-9b-ul2")
    with pytest.raises(ValueError, match=r"^folder: got .*t5gemma.*, allowed: "):
        Engine.from_pretrained(copy)


def poison(file, key):
    state = load_file(file)
    state[key][0] = torch.nan
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize("field", ["text_in_channels", "video_in_channels", "audio_in_channels"])
def test_a_model_that_reads_other_channels_is_refused(copy, field):
    config = copy / "distill" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: 24}))
    with pytest.raises(ValueError, match=r"^model distill: got .*24.* channels of video, audio, text, allowed: "):
        Engine.from_pretrained(copy)


def test_the_audio_prefix_is_the_released_one(converted):
    keys = load_file(converted / "stable-audio-open-1.0" / "model.safetensors").keys()
    ours = [key.removeprefix("pretransform.model.") for key in keys if key.startswith("pretransform.model.")]
    assert len(ours) == 365
    assert len({audio_vae.rename(key) for key in ours}) == 365
