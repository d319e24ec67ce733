"""The Stable Audio autoencoder against its recordings; windows, resampling, odd lengths."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from horsepower.runtime.models import audio_vae
from recordings import Recording, find, max_error

pytestmark = pytest.mark.golden

RATE, STRIDE = audio_vae.CODEC_RATE, audio_vae.STRIDE


@pytest.fixture(scope="module", params=find("audio_"), ids=str)
def recording(request: pytest.FixtureRequest) -> Recording:
    return request.param


@pytest.fixture(scope="module")
def tensors(recording: Recording) -> dict[str, Tensor]:
    return recording.tensors


@pytest.fixture
def config(recording: Recording) -> dict[str, Any]:
    return copy.deepcopy(recording.info["config"])


@pytest.fixture(scope="module")
def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under diffusers' names; a snake's alpha and beta are [C] in the release and [1, C, 1] there."""
    released = {audio_vae.rename(key[2:]): value for key, value in tensors.items() if key.startswith("w.")}
    return {k: v.view(1, -1, 1) if k.endswith(("alpha", "beta")) else v for k, v in released.items()}


@pytest.fixture(scope="module")
def tiny(recording: Recording, weights: dict[str, Tensor]) -> Any:
    vae = audio_vae.build("meta", **audio_vae.config_from_stable_audio(recording.info["config"]))
    vae.load_state_dict(weights, assign=True)
    return vae


def noise(seed: int) -> Callable[[tuple[int, ...]], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def no_noise(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape)


def sound(samples: int) -> Tensor:
    return torch.randn(2, samples, generator=torch.Generator().manual_seed(2)) * 0.3


def test_encode_golden(tensors: dict[str, Tensor], tiny: Any) -> None:
    assert max_error(tiny.encoder(tensors["wave"]), tensors["encoder_out"]) < 1e-4
    latents = audio_vae.encode(tiny, tensors["wave"][0], lambda shape: tensors["noise"].view(shape))
    assert max_error(latents, tensors["latent"].transpose(1, 2)) < 1e-4


def test_decode_golden(tensors: dict[str, Tensor], tiny: Any) -> None:
    assert max_error(audio_vae.decode(tiny, tensors["z"].T[None]), tensors["resampled"]) < 1e-4
    resampled = audio_vae.resample_fft(tensors["decoded"], tensors["decoded"].shape[1] * 441 // 512)
    assert max_error(resampled.T, tensors["resampled"]) < 1e-4


def test_released_shape(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    for half in ("encoder", "decoder"):
        config["model"][half]["config"]["channels"] = 128
    as_released = {"sample_rate": 44100, "model": {"pretransform": {"config": config["model"]}, "diffusion": {}}}
    before = torch.get_rng_state()
    state = audio_vae.build("meta", **audio_vae.config_from_stable_audio(as_released)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert state.keys() == audio_vae.build("meta").state_dict().keys() == weights.keys()
    assert len(state) == 365
    assert sum(value.numel() for value in state.values()) == 156_112_514


def test_norms_are_multiplied_in_to_the_same_bits(tiny: Any) -> None:
    plain = audio_vae.without_weight_norm(copy.deepcopy(tiny))
    assert not [name for name in plain.state_dict() if name.endswith(("weight_g", "weight_v"))]
    wave, latents = sound(3 * 2048), torch.ones(1, 3, 64)
    assert torch.equal(audio_vae.encode(plain, wave, no_noise), audio_vae.encode(tiny, wave, no_noise))
    assert torch.equal(audio_vae.decode(plain, latents), audio_vae.decode(tiny, latents))
    assert not any(x.requires_grad for x in plain.parameters())


def test_copies_are_independent(tiny: Any) -> None:
    fresh = audio_vae.build("meta")
    copy.deepcopy(fresh)
    latents = torch.ones(1, 2, 64)
    expected = audio_vae.decode(tiny, latents)
    twin = copy.deepcopy(tiny)
    twin.decoder.conv1.weight_g.mul_(2)
    assert not torch.equal(audio_vae.decode(twin, latents), expected)
    assert torch.equal(audio_vae.decode(tiny, latents), expected)


@pytest.mark.parametrize("samples", [2048, 2049, 4095, 12_345, 51_200])
def test_odd_sample_counts(tiny: Any, samples: int) -> None:
    latents = audio_vae.encode(tiny, sound(samples), noise(0))
    assert latents.shape == (1, samples // STRIDE, 64)
    assert latents.dtype == torch.float32
    wave = audio_vae.decode(tiny, latents)
    assert wave.shape == (latents.shape[1] * 1764, 2)
    assert wave.dtype == torch.float32


def test_noise_is_the_callers(tiny: Any) -> None:
    before = torch.get_rng_state()
    wave = sound(3 * STRIDE)
    first, again, other = (audio_vae.encode(tiny, wave, noise(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    mean = audio_vae.encode(tiny, wave, no_noise)
    two = audio_vae.encode(tiny, wave, lambda shape: torch.full(shape, 2.0))
    std = torch.nn.functional.softplus(tiny.encoder(wave[None]).chunk(2, dim=1)[1]) + 1e-4
    assert torch.allclose(two - mean, 2 * std.transpose(1, 2), atol=1e-5)


def test_29_seconds_are_one_window(tiny: Any) -> None:
    shapes: list[tuple[int, ...]] = []

    def draw(shape: tuple[int, ...]) -> Tensor:
        shapes.append(shape)
        return torch.zeros(shape)

    assert audio_vae.encode(tiny, sound(29 * RATE), draw).shape == (1, 725, 64)
    assert shapes == [(1, 64, 725)]
    shapes.clear()
    assert audio_vae.encode(tiny, sound(29 * RATE + 1), draw).shape == (1, 726, 64)
    assert shapes == [(1, 64, 725)] * 2


@pytest.mark.parametrize("seconds", [35, 50])
def test_windows_are_cross_faded(tiny: Any, seconds: int) -> None:
    samples = seconds * RATE + 777
    wave = sound(samples)
    latents = audio_vae.encode(tiny, wave, no_noise)
    assert latents.shape == (1, -(-samples // STRIDE), 64)
    starts = range(0, latents.shape[1] - 363, 362)
    total = torch.zeros(1, 64, starts[-1] + 725)
    weight = torch.zeros(starts[-1] + 725)
    wave = torch.nn.functional.pad(wave, (0, (starts[-1] + 725) * STRIDE - samples))
    for start in starts:
        ramp = torch.ones(725)
        if start > 0:
            ramp[:363] = torch.arange(363) / 362
        if start < starts[-1]:
            ramp[-363:] = 1 - torch.arange(363) / 362
        mean = tiny.encoder(wave[None, :, start * STRIDE : (start + 725) * STRIDE])[:, :64]
        total[..., start : start + 725] += ramp * mean
        weight[start : start + 725] += ramp
    assert torch.allclose(weight, torch.ones_like(weight), atol=1e-6)
    assert max_error(latents, total[..., : latents.shape[1]].transpose(1, 2)) < 1e-5


def test_windows_keep_time(tiny: Any) -> None:
    """A click in the third window lands in the same latent as in one piece: windows start on whole latents."""
    wave = torch.zeros(2, 45 * RATE)
    wave[:, 40 * RATE] = 1
    silence = audio_vae.encode(tiny, torch.zeros_like(wave), no_noise)
    moved = (audio_vae.encode(tiny, wave, no_noise) - silence).abs().sum(dim=(0, 2))
    alone = tiny.encoder(wave[None, :, 38 * RATE : 42 * RATE]) - tiny.encoder(torch.zeros(1, 2, 4 * RATE))
    assert moved.argmax() == 38 * 25 + alone[:, :64].abs().sum(dim=(0, 1)).argmax()


@pytest.mark.parametrize(("length", "samples"), [(512, 441), (511, 440), (64, 128), (63, 127), (64, 33), (9, 9)])
def test_resampling_keeps_low_sines(length: int, samples: int) -> None:
    def sine(points: int) -> Tensor:
        return torch.sin(2 * torch.pi * 3 * torch.arange(points, dtype=torch.float64) / points + 0.4)

    assert torch.allclose(audio_vae.resample_fft(sine(length), samples), sine(samples), atol=1e-12)


def test_resampling_nyquist_as_scipy() -> None:
    """Values of scipy.signal.resample 1.17 on a signal whose energy is all at half the sampling rate."""
    alternating = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    up = audio_vae.resample_fft(alternating, 8)
    assert torch.allclose(up, torch.tensor([1.0, 0, -1, 0, 1, 0, -1, 0], dtype=torch.float64), atol=1e-15)
    down = audio_vae.resample_fft(torch.tensor([1.0, 0, -1, 0, 1, 0, -1, 0], dtype=torch.float64), 4)
    assert torch.allclose(down, alternating, atol=1e-15)
    assert torch.equal(audio_vae.resample_fft(alternating, 4), alternating)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("decoder.config.final_tanh", True),
        ("encoder.config.use_snake", False),
        ("encoder.config.strides", [2, 4, 4, 8]),
        ("encoder.config.latent_dim", 64),
        ("bottleneck.type", "rvq"),
        ("downsampling_ratio", 1024),
    ],
)
def test_bad_configuration(config: dict[str, Any], path: str, value: Any) -> None:
    *folders, leaf = path.split(".")
    field = config["model"]
    for name in folders:
        field = field[name]
    field[leaf] = value
    with pytest.raises(ValueError, match=rf"^model\.{path}: got .*allowed"):
        audio_vae.config_from_stable_audio(config)
    del field[leaf]
    with pytest.raises(ValueError, match=rf"^model\.{path}: missing"):
        audio_vae.config_from_stable_audio(config)


def test_bad_rate_and_empty_configuration(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^sample_rate: got 48000, allowed: 44100"):
        audio_vae.config_from_stable_audio(config | {"sample_rate": 48000})
    with pytest.raises(ValueError, match=r"^model: missing"):
        audio_vae.config_from_stable_audio({})


@pytest.mark.parametrize("key", ["bottleneck.x", "encoder.layers.0.1.bias", "pretransform.model.encoder.layers.0.bias"])
def test_bad_key(key: str) -> None:
    with pytest.raises(ValueError, match=r"^key: got"):
        audio_vae.rename(key)


@pytest.mark.parametrize("shape", [(1, 4096), (2, 2047), (2, 0), (1, 2, 4096)])
def test_bad_wave(tiny: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^wave: got shape"):
        audio_vae.encode(tiny, torch.zeros(shape), no_noise)


@pytest.mark.parametrize("shape", [(4, 64), (1, 64, 4), (1, 0, 64), (2, 4, 64)])
def test_bad_latents(tiny: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^latents: got shape"):
        audio_vae.decode(tiny, torch.zeros(shape))
