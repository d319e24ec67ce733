"""The Stable Audio Open autoencoder through diffusers' AutoencoderOobleck: stereo, 64 channels, stride 2048.

It is a 44.1 kHz model that is fed and played at 51.2 kHz, which makes exactly 25 latents a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderOobleck

CHANNELS = 64  # of a latent
STRIDE = 2048  # samples per latent
CODEC_RATE = 51_200  # Hz, what goes into `encode`
OUTPUT_RATE = 44_100  # Hz, what comes out of `decode`
WINDOW = 29 * CODEC_RATE // STRIDE  # latents; longer sound is encoded in windows of this size
HOP = WINDOW // 2  # latents from one window to the next: half a window, down to a whole latent

# What the released configuration says and diffusers' class takes for granted.
_FIXED = {
    "encoder.type": "oobleck",
    "encoder.config.use_snake": True,
    "encoder.config.in_channels": 2,
    "encoder.config.latent_dim": 2 * CHANNELS,
    "decoder.type": "oobleck",
    "decoder.config.use_snake": True,
    "decoder.config.final_tanh": False,
    "decoder.config.out_channels": 2,
    "decoder.config.latent_dim": CHANNELS,
    "bottleneck.type": "vae",
    "downsampling_ratio": STRIDE,
}
_SAME = ("strides", "c_mults")  # in encoder and decoder

_TOP = {"0": "conv1", "6": "snake1", "7": "conv2"}
_UNIT = {"0": "snake1", "1": "conv1", "2": "snake2", "3": "conv2"}
_BLOCK = {
    "encoder": {"0": "res_unit1", "1": "res_unit2", "2": "res_unit3", "3": "snake1", "4": "conv1"},
    "decoder": {"0": "snake1", "1": "conv_t1", "2": "res_unit1", "3": "res_unit2", "4": "res_unit3"},
}
_KEY = re.compile(r"(encoder|decoder)\.layers\.(\d)(?:\.layers\.(\d))?(?:\.layers\.(\d))?\.(\w+)")


def rename(key: str) -> str:
    """The key in diffusers' AutoencoderOobleck of a released key, its prefix `pretransform.model.` taken off.

    Raises ValueError for a key that is not of the autoencoder.
    """
    match = _KEY.fullmatch(key)
    try:
        half, top, inner, unit, leaf = match.groups() if match else ("", "", "", "", "")
        if inner is None:
            return f"{half}.{_TOP[top]}.{leaf}"
        parts = [half, "block", str(int(top) - 1), _BLOCK[half][inner]]
        return ".".join([*parts, leaf] if unit is None else [*parts, _UNIT[unit], leaf])
    except (KeyError, ValueError):
        raise ValueError(f"key: got {key!r}, allowed: those of Stable Audio's encoder and decoder") from None


def config_from_stable_audio(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `build` from Stable Audio's model_config.json (or that of an autoencoder alone).

    Raises ValueError, naming the field, where one is missing or asks for what the release does not use.
    """
    model = _field(config, "model")
    root = "model.pretransform.config" if isinstance(model, Mapping) and "pretransform" in model else "model"
    allowed = {f"{root}.{path}": value for path, value in _FIXED.items()}
    allowed |= {f"{root}.encoder.config.{name}": _field(config, f"{root}.decoder.config.{name}") for name in _SAME}
    for path, value in {"sample_rate": OUTPUT_RATE, **allowed}.items():
        if _field(config, path) != value:
            raise ValueError(f"{path}: got {_field(config, path)!r}, allowed: {value!r}")
    return {
        "encoder_width": _integer(config, f"{root}.encoder.config.channels"),
        "decoder_width": _integer(config, f"{root}.decoder.config.channels"),
        "multipliers": _integers(config, f"{root}.encoder.config.c_mults"),
        "strides": _integers(config, f"{root}.encoder.config.strides"),
    }


def config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `build` from the config.json that diffusers writes for an AutoencoderOobleck.

    Raises ValueError naming a missing field.
    """
    return {
        "encoder_width": _integer(config, "encoder_hidden_size"),
        "decoder_width": _integer(config, "decoder_channels"),
        "multipliers": _integers(config, "channel_multiples"),
        "strides": _integers(config, "downsampling_ratios"),
    }


def _integer(config: Mapping[str, Any], path: str) -> int:
    value = _field(config, path)
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: got {value!r}, allowed: a positive integer")
    return value


def _integers(config: Mapping[str, Any], path: str) -> tuple[int, ...]:
    value = _field(config, path)
    if not isinstance(value, list) or not all(type(n) is int and n > 0 for n in value):
        raise ValueError(f"{path}: got {value!r}, allowed: positive integers")
    return tuple(value)


def _field(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise ValueError(f"{path}: missing in the configuration")
        value = value[name]
    return value


def build(
    device: torch.device | str,
    *,
    encoder_width: int = 128,
    decoder_width: int = 128,
    multipliers: tuple[int, ...] = (1, 2, 4, 8, 16),
    strides: tuple[int, ...] = (2, 4, 4, 8, 8),
) -> AutoencoderOobleck:
    """The autoencoder in float32 and evaluation mode; the defaults are Stable Audio Open 1.0 (156.1 M parameters).

    On `device="meta"` nothing is allocated; fill it with `load_state_dict(..., assign=True)`.
    """
    from diffusers import AutoencoderOobleck

    # Without no_grad each weight-normed convolution would hold a weight with a graph, which cannot be deep-copied.
    with torch.device(device), torch.no_grad():
        vae = AutoencoderOobleck(
            encoder_hidden_size=encoder_width,
            downsampling_ratios=list(strides),
            channel_multiples=list(multipliers),
            decoder_channels=decoder_width,
            decoder_input_channels=CHANNELS,
            audio_channels=2,
            sampling_rate=OUTPUT_RATE,
        )
        if encoder_width != 2 * CHANNELS:
            # diffusers ties the encoder's output to its base width; only in the release are the two equal.
            last = nn.Conv1d(encoder_width * multipliers[-1], 2 * CHANNELS, kernel_size=3, padding=1)
            vae.encoder.conv2 = nn.utils.weight_norm(last)
    return vae.eval().requires_grad_(False)


def without_weight_norm(vae: AutoencoderOobleck) -> AutoencoderOobleck:
    """The same autoencoder, changed in place: each weight is multiplied with its norm once, to the same bits."""
    with torch.no_grad():
        for module in vae.modules():
            if hasattr(module, "weight_g"):
                nn.utils.remove_weight_norm(module)
    return vae.requires_grad_(False)


def encode(vae: AutoencoderOobleck, wave: Tensor, draw_noise: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Stereo sound [2, S] at 51.2 kHz to latents float32 [1, A, 64], 25 a second.

    The posterior is sampled, as Stable Audio's bottleneck does: `draw_noise(shape)` gives standard normal noise
    [1, 64, n], once a window. Up to 29 s, A = S // 2048. Longer sound is encoded in windows of 29 s, the last one
    padded with zeros, that overlap by half and are cross-faded linearly; then A = ceil(S / 2048).
    Raises ValueError if the sound is not stereo or shorter than one latent.
    """
    if wave.ndim != 2 or wave.shape[0] != 2 or wave.shape[1] < STRIDE:
        raise ValueError(f"wave: got shape {list(wave.shape)}, allowed: [2, S] with S >= {STRIDE}")
    samples = wave.shape[1]
    if samples <= WINDOW * STRIDE:
        return _encode_window(vae, wave, draw_noise).transpose(1, 2)
    windows = 1 + ceil((samples - WINDOW * STRIDE) / (HOP * STRIDE))
    wave = F.pad(wave, (0, ((windows - 1) * HOP + WINDOW) * STRIDE - samples))
    overlap = WINDOW - HOP
    rise = torch.linspace(0, 1, overlap, device=next(vae.parameters()).device)
    latents = _encode_window(vae, wave[:, : WINDOW * STRIDE], draw_noise)
    for start in range(HOP, windows * HOP, HOP):
        window = _encode_window(vae, wave[:, start * STRIDE : (start + WINDOW) * STRIDE], draw_noise)
        seam = torch.lerp(latents[..., -overlap:], window[..., :overlap], rise)
        latents = torch.cat([latents[..., :-overlap], seam, window[..., overlap:]], dim=-1)
    return latents[..., : ceil(samples / STRIDE)].transpose(1, 2)


def _encode_window(vae: AutoencoderOobleck, wave: Tensor, draw_noise: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """One stretch of sound [2, S] to a sample of its posterior, [1, 64, S // 2048]."""
    posterior = vae.encode(wave[None].to(next(vae.parameters()))).latent_dist
    mean: Tensor = posterior.mean
    std: Tensor = posterior.std
    return (mean + std * draw_noise(tuple(mean.shape)).to(mean)).float()


def decode(vae: AutoencoderOobleck, latents: Tensor) -> Tensor:
    """Latents [1, A, 64] to stereo sound float32 [1764 A, 2] at 44.1 kHz, not clamped.

    The codec's 2048 A samples are meant as 51.2 kHz, hence the resampling by 441/512.
    """
    if latents.ndim != 3 or latents.shape[0] != 1 or latents.shape[1] == 0 or latents.shape[2] != CHANNELS:
        raise ValueError(f"latents: got shape {list(latents.shape)}, allowed: [1, A, {CHANNELS}]")
    wave: Tensor = vae.decode(latents.transpose(1, 2).to(next(vae.parameters()))).sample[0].float()
    return resample_fft(wave, wave.shape[-1] * OUTPUT_RATE // CODEC_RATE).T


def resample_fft(x: Tensor, samples: int) -> Tensor:
    """Resamples real x along its last dimension through its spectrum; equal to scipy.signal.resample."""
    length = x.shape[-1]
    shared = min(length, samples)
    spectrum = torch.fft.rfft(x)[..., : shared // 2 + 1]
    if shared % 2 == 0 and samples != length:
        # The shorter signal's Nyquist bin stands for +f and -f at once; the longer one keeps those apart.
        spectrum[..., -1] *= 2.0 if samples < length else 0.5
    resampled: Tensor = torch.fft.irfft(spectrum, n=samples)
    return resampled * (samples / length)
