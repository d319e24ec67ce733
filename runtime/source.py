"""Where an engine's parts come from: the built-in preset, or a folder of released checkpoints."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from horsepower.quant.quantised import Values
from horsepower.runtime.checkpoint import fill
from horsepower.runtime.models import audio_vae, wan_vae
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.text import TextEncoder
from horsepower.runtime.models.turbo_vae import TurboDecoder
from horsepower.runtime.phases import PartSizes
from horsepower.runtime.presets import ModelName
from horsepower.runtime.quantised_checkpoint import Stored, preset_of
from horsepower.runtime.residence import Movable

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, AutoencoderOobleck


class VideoDecoder(Movable, Protocol):
    def __call__(self, latents: Tensor) -> Iterator[Tensor]:
        """Latents [1, 48, T, h, w] -> pixel chunks [1, 3, f, 16 h, 16 w] in [-1, 1], 4 T - 3 frames in all."""
        ...


class ImageEncoder(Movable, Protocol):
    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels [1, 3, 1, H, W] in [-1, 1] -> one normalised latent frame [1, 48, 1, H / 16, W / 16], float32."""
        ...


class Turbo:
    """The Turbo decoder. Latents are rounded to its dtype before they are de-normalised."""

    def __init__(self, decoder: TurboDecoder, dtype: torch.dtype):
        self._decoder, self._dtype = decoder, dtype

    def __call__(self, latents: Tensor) -> Iterator[Tensor]:
        return self._decoder.decode_chunks(latents.to(self._dtype))

    def to(self, device: torch.device) -> "Turbo":
        self._decoder.to(device)
        return self


class WanEncoder:
    """Wan's encoder, of a VAE that may have lost its decoder."""

    def __init__(self, vae: "AutoencoderKLWan"):
        self._vae = vae

    def __call__(self, pixels: Tensor) -> Tensor:
        return wan_vae.encode(self._vae, pixels)

    def to(self, device: torch.device) -> "WanEncoder":
        nn.Module.to(self._vae, device)
        return self


class WanDecoder:
    """Wan's decoder, of a VAE that may have lost its encoder."""

    def __init__(self, vae: "AutoencoderKLWan"):
        self._vae = vae

    def __call__(self, latents: Tensor) -> Iterator[Tensor]:
        yield wan_vae.decode(self._vae, latents)

    def to(self, device: torch.device) -> "WanDecoder":
        nn.Module.to(self._vae, device)
        return self


class AudioCodec(Movable, Protocol):
    """Sound to latents, 25 a second, and back."""

    def encode(self, wave: Tensor, draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """Stereo float32 [2, S] at 51.2 kHz -> [1, S // 2048, 64], sampled with normal draws from `draw`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[1, A, 64] -> stereo float32 [S, 2] at 44.1 kHz."""
        ...


class OobleckCodec:
    """Stable Audio's autoencoder as a codec."""

    def __init__(self, vae: "AutoencoderOobleck"):
        """The norms of its weights are multiplied in: they are not made anew, and held beside, at each call."""
        self._vae = audio_vae.without_weight_norm(vae)

    def to(self, device: torch.device) -> "OobleckCodec":
        self._vae.to(device)
        return self

    def encode(self, wave: Tensor, draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
        return audio_vae.encode(self._vae, wave, draw)

    def decode(self, latents: Tensor) -> Tensor:
        return audio_vae.decode(self._vae, latents)


class Source(PartSizes, Protocol):
    """Builds parts on the engine's device, anew at each call, and keeps none of them."""

    notes: tuple[str, ...]  # what every result made from this source should say

    def models(self) -> tuple[ModelName, ...]:
        """The DiTs that are there."""
        ...

    def stored(self, name: ModelName) -> Stored | None:
        """What a DiT's checkpoint says of itself, if it holds weights of eight bits."""
        ...

    def weights(self, name: ModelName) -> Values:
        """A DiT's parameters and buffers by name, in its dtypes, read when they are asked for, on any device."""
        ...

    def text_encoder(self) -> TextEncoder: ...

    def image_encoder(self) -> ImageEncoder: ...

    def video_decoder(self) -> VideoDecoder: ...

    def audio_codec(self) -> AudioCodec: ...


def eager_dit(source: Source, name: ModelName, device: torch.device, dtype: torch.dtype) -> DiT:
    """A DiT as it is written, all its weights on a device; dtype: of its matrix products."""
    model = DiT(source.config(name), dtype, "meta")
    fill(model, source.weights(name), device)
    return model.eval()


def open_source(folder: str | os.PathLike[str], device: torch.device, dtype: torch.dtype) -> Source:
    """The preset "foal", or a folder of checkpoints. Raises ValueError if there is none."""
    if folder == "foal":
        from horsepower.runtime.foal import Foal

        return Foal(device, dtype)
    from horsepower.runtime.foal import StoredFoal
    from horsepower.runtime.released import ReleasedFolder

    if not isinstance(folder, str | os.PathLike) or not Path(folder).is_dir():
        raise ValueError(f"folder: got {str(folder)!r}, allowed: a folder of checkpoints, or the preset foal")
    kind = StoredFoal if preset_of(Path(folder)) == "foal" else ReleasedFolder
    return kind(Path(folder), device, dtype)
