"""The engine with the built-in preset: what comes out, that it repeats, and what it refuses."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from horsepower import Cancelled, Engine, Progress, Request
from horsepower.runtime import engine as engine_module
from horsepower.runtime.phases import audio_latents, base_stage
from horsepower.runtime.pipeline import BaseGuidance, Stage
from horsepower.runtime.presets import PIPELINES, Pipeline

SMALL = {"resolution": (64, 32), "duration": 0.6, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def foal() -> Engine:
    return Engine.from_pretrained("foal")


@pytest.fixture(scope="module")
def base() -> Engine:
    return Engine.from_pretrained("foal", model="base")


def request(prompt: str = "A horse at sunset", **kwargs) -> Request:
    return Request(prompt=prompt, **SMALL | kwargs)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "frame.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def sound(tmp_path):
    import wave

    path = tmp_path / "voice.wav"
    samples = (np.sin(np.arange(16000) / 16000 * 2 * np.pi * 220) * 12000).astype(np.int16)
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(16000)
        f.writeframes(samples.tobytes())
    return path


def test_a_clip(foal):
    seen: list[Progress] = []
    result = foal.run(request(), seen.append)
    assert result.video.shape == (13, 32, 64, 3)  # 16 rows of audio: 4 latent frames, 4 (T - 1) + 1 pictures
    assert result.video.dtype == torch.uint8
    assert result.audio.shape == (16 * 1764, 2)
    assert result.audio.dtype == torch.float32
    assert (result.fps, result.sample_rate, result.seed, result.size) == (25, 44100, 42, (64, 32))
    assert list(result.timings.stages) == ["text", "base", "video", "audio"]
    assert result.timings.peak_memory > 0
    assert [p.step for p in seen if p.stage == "base"] == [0, 1, 2]
    assert any("untrained" in note for note in result.notes)
    assert not result.video.requires_grad
    assert not result.video.is_inference()
    assert result.video.float().std() > 5
    assert 0.01 < result.audio.std() < 0.5


def test_prompt_seed_and_steps_matter(foal):
    clip = foal.run(request())
    for other in ({"prompt": "A cat at sunset"}, {"seed": 43}, {"num_inference_steps": 3}):
        assert foal.run(request(**other)) != clip


def test_the_same_bits_alone_after_others_and_from_threads(foal):
    alone = foal.run(request(seed=7))
    foal.run(request("Something else", seed=1, duration=1, resolution=(32, 64)))
    torch.manual_seed(123)
    assert foal.run(request(seed=7)) == alone
    assert Engine.from_pretrained("foal").run(request(seed=7)) == alone
    seeds, results = [7, 1, 7, 2], {}

    def work(i):
        results[i] = foal.run(request(seed=seeds[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(seeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == alone == results[2]
    assert results[1] != alone


def test_a_run_leaves_the_global_generator_alone(foal):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    foal.run(request())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_is_the_first_frame(foal, picture):
    plain, led = foal.run(request()), foal.run(request(image=picture))
    assert led != plain
    assert foal.run(request(image=Image.open(picture))) == led
    assert "conditioning" in led.timings.stages


def test_sound_leads_and_is_kept_on_request(foal, base, sound):
    led, kept = foal.run(request(audio=sound)), foal.run(request(audio=sound, keep_audio=True))
    assert led.audio.shape == kept.audio.shape == (15 * 1764, 2)  # floor(0.6 s * 25) latents of given sound
    assert led != kept
    # Kept sound does not depend on what the video is; it is the codec's own round trip.
    assert torch.equal(foal.run(request("A cat", audio=sound, keep_audio=True)).audio, kept.audio)
    assert torch.equal(base.run(request(audio=sound)).audio, kept.audio)


def test_a_clip_is_no_longer_than_its_sound(foal, sound):
    assert len(foal.run(request(audio=sound, duration=10)).audio) == 25 * 1764


@pytest.fixture
def small_pipelines(monkeypatch):
    """Super-resolution of pictures that are decoded in no time."""
    monkeypatch.setitem(PIPELINES, "256p", Pipeline(64, 32, None))
    monkeypatch.setitem(PIPELINES, "540p", Pipeline(96, 64, "540p_sr"))


def test_super_resolution(foal, picture, small_pipelines):
    result = foal.run(request(resolution=(96, 64), duration=0.2, num_inference_steps=1, image=picture))
    assert result.size == (96, 64)
    assert list(result.timings.stages) == ["text", "conditioning", "base", "super-resolution", "video", "audio"]


def test_the_base_model(base):
    plain = base.run(request())
    for other in ({"guidance": 1.5}, {"negative_prompt": "rain"}, {"sampler": "sde"}):
        assert base.run(request(**other)) != plain


@pytest.mark.parametrize("field", ["guidance", "negative_prompt", "sampler"])
def test_the_distilled_model_has_no_guidance(foal, field):
    value = {"guidance": 3.0, "negative_prompt": "rain", "sampler": "unipc"}[field]
    with pytest.raises(ValueError, match=f"^{field}: got .*, allowed: None with the distilled model"):
        foal.run(request(**{field: value}))


def test_what_was_changed_is_said(foal):
    notes = foal.run(request("horse " * 800, resolution=(70, 40))).notes
    assert "prompt: 801 tokens, of which the first 640 were used" in notes
    assert "resolution: 70x40 was rounded down to 64x32, multiples of 32" in notes


def test_speech_changes_the_clip(foal):
    said = foal.run(request(speech_text="Run!", speech_language="en"))
    assert said != foal.run(request())
    assert said != foal.run(request(speech_text="Run!", speech_language="de"))


def test_cancelled_between_steps_and_usable_after(foal):
    cancel = threading.Event()
    seen = []

    def watch(progress):
        seen.append(progress)
        if progress.stage == "base" and progress.step == 1:
            cancel.set()

    with pytest.raises(Cancelled, match="step 2 of 4 of stage base"):
        foal.run(request(num_inference_steps=4), watch, cancel)
    assert seen[-1].step == 1
    foal.run(request())


def test_cancelled_while_others_run(foal):
    """The request that waits is never started; the one that runs is not touched."""
    cancel, started, seen, results = threading.Event(), threading.Event(), [], {}

    def slow(progress):
        started.set()
        if progress.stage == "base":
            assert refused.wait(30)

    refused = threading.Event()
    first = threading.Thread(target=lambda: results.update(first=foal.run(request(), slow)))
    first.start()
    assert started.wait(30)
    cancel.set()
    with pytest.raises(Cancelled, match="while waiting"):
        foal.run(request(), seen.append, cancel)
    refused.set()
    first.join()
    assert not seen
    assert results["first"] == foal.run(request())


def test_a_request_from_its_own_callback_is_refused(foal):
    with pytest.raises(RuntimeError, match="from a callback of its own request"):
        foal.run(request(), lambda _: foal.run(request()))
    foal.run(request())


def test_memory_is_looked_at_in_turn(foal, monkeypatch):
    """What another request holds for the moment does not count against the one that waits."""
    monkeypatch.setattr(engine_module.memory, "free_bytes", lambda device: 10**12 if foal._lock.locked() else 0)
    foal.run(request())


def test_settings_by_default():
    ask = request(num_inference_steps=None)
    assert base_stage(ask, "distill") == Stage("base", 8, "distilled")
    assert base_stage(ask, "base") == Stage("base", 32, "unipc", BaseGuidance(5.0, 5.0))


@pytest.mark.parametrize(("duration", "latents"), [(0.2, 6), (1.16, 30), (2, 51), (4.6, 116), (8.2, 206)])
def test_a_duration_is_not_cut_by_binary_fractions(duration, latents):
    assert audio_latents(request(duration=duration)) == latents


def test_guided_super_resolution(foal, small_pipelines):
    ask = {"resolution": (96, 64), "duration": 0.2, "num_inference_steps": 1}
    plain = foal.run(request(**ask))
    assert foal.run(request(super_resolution_guidance=3.5, negative_prompt="rain", **ask)) != plain
    with pytest.raises(ValueError, match="^super_resolution_guidance: got 3.5, allowed: None at"):
        foal.run(request(super_resolution_guidance=3.5))


def test_an_error_in_a_callback_ends_the_request_only(foal):
    def fail(progress):
        raise KeyError(progress.stage)

    with pytest.raises(KeyError):
        foal.run(request(), fail)
    foal.run(request())


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"model": "1080p_sr"}, "model"),
        ({"model": "large"}, "model"),
        ({"mode": "warp"}, "mode"),
        ({"device": "tpu9"}, "device"),
        ({"device": "meta"}, "device"),
        ({"dtype": torch.int8}, "dtype"),
        ({"folder": "/nowhere/at/all"}, "folder"),
        ({"folder": 3}, "folder"),
    ],
)
def test_bad_engines(arguments, field):
    with pytest.raises(ValueError, match=f"^{field}: got .*, allowed: "):
        Engine.from_pretrained(**{"folder": "foal"} | arguments)


def test_a_clip_beyond_memory_is_refused_before_any_work(foal, monkeypatch):
    monkeypatch.setattr(engine_module.memory, "free_bytes", lambda device: 10_000_000 - foal._parts.bytes)
    seen = []
    with pytest.raises(ValueError, match="^resolution, duration: got 448x256 .* allowed: what fits 0.0 GiB of cpu"):
        foal.run(Request(prompt="A horse"), seen.append)
    assert not seen


def test_only_requests_are_run(foal):
    with pytest.raises(ValueError, match="^request: got str, allowed: a Request"):
        foal.run("A horse")


def test_float32_is_near_bfloat16(foal):
    exact = Engine.from_pretrained("foal", dtype=torch.float32)
    rounded = Engine.from_pretrained("foal", dtype=torch.bfloat16)
    a, b = (engine.run(request(num_inference_steps=1)).video.float() for engine in (exact, rounded))
    assert 0 < (a - b).abs().mean() < 5
