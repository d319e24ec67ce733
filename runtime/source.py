"""Where an engine's parts come from: the built-in preset, or a folder of released checkpoints."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from horsepower.quant import transformer_engine
from horsepower.quant.scheme import Scheme
from horsepower.runtime.checkpoint import fill
from horsepower.runtime.models import audio_vae
from horsepower.runtime.models.dit import DiT, Linear
from horsepower.runtime.models.dit_config import DiTConfig
from horsepower.runtime.models.text import TextEncoder
from horsepower.runtime.presets import ModelName
from horsepower.runtime.tokens import Grid

if TYPE_CHECKING:
    from diffusers import AutoencoderOobleck

# Latents [1, 48, T, h, w] -> pixel chunks [1, 3, f, 16 h, 16 w] in [-1, 1], 4 T - 3 frames in all.
VideoDecoder = Callable[[Tensor], Iterable[Tensor]]
# Pixels [1, 3, 1, H, W] in [-1, 1] -> one normalised latent frame [1, 48, 1, H / 16, W / 16], float32.
ImageEncoder = Callable[[Tensor], Tensor]


class AudioCodec(Protocol):
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
        self._vae = vae

    def encode(self, wave: Tensor, draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
        return audio_vae.encode(self._vae, wave, draw)

    def decode(self, latents: Tensor) -> Tensor:
        return audio_vae.decode(self._vae, latents)


class Source(Protocol):
    """Builds parts on the engine's device; each method is called at most once for each part."""

    notes: tuple[str, ...]  # what every result made from this source should say

    def models(self) -> tuple[ModelName, ...]:
        """The DiTs that are there."""
        ...

    def config(self, name: ModelName) -> DiTConfig: ...

    def weights(self, name: ModelName) -> Mapping[str, Tensor]:
        """A DiT's parameters and buffers by name, in its dtypes, read when they are asked for, on any device."""
        ...

    def text_encoder(self) -> TextEncoder: ...

    def image_encoder(self) -> ImageEncoder: ...

    def video_decoder(self) -> VideoDecoder: ...

    def decode_bytes(self, grid: Grid) -> int:
        """What the video decoder will need beside its weights, before it is loaded."""
        ...

    def audio_codec(self) -> AudioCodec: ...


def te_dit(source: Source, name: ModelName, device: torch.device, dtype: torch.dtype, scheme: Scheme) -> DiT:
    """A DiT as it is written, with Transformer Engine's linear layers in its blocks.

    Weights are streamed: of those that are quantised one is on the device at a time as it was. Raises ValueError where
    the package is not there.
    """
    model, weights = DiT(source.config(name), dtype, "meta"), source.weights(name)
    taken = transformer_engine.convert(model, Linear, lambda path: weights[f"{path}.weight"].to(device), scheme)
    fill(model, weights, device, skip=tuple(taken))
    return model.eval()


def eager_dit(source: Source, name: ModelName, device: torch.device, dtype: torch.dtype) -> DiT:
    """A DiT as it is written, all its weights on a device; dtype: of its matrix products."""
    model = DiT(source.config(name), dtype, "meta")
    fill(model, source.weights(name), device)
    return model.eval()
