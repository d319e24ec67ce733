"""`foal`, the built-in preset: the full 40-layer path, small enough for any CPU, with nothing to download.

Its weights come from a fixed seed; they are not trained. The clips have the form of the real ones (size, length, rate,
response to prompt, image and sound) and no meaning.
"""

import zlib
from pathlib import Path

import torch
from torch import nn

from horsepower.quant.quantised import Values
from horsepower.runtime import memory
from horsepower.runtime.executor import weights_of
from horsepower.runtime.memory import PartBytes
from horsepower.runtime.models import audio_vae, wan_vae
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit_config import DiTConfig
from horsepower.runtime.models.text import HashedWordEncoder, TextEncoder
from horsepower.runtime.models.turbo_vae import TurboConfig, TurboDecoder
from horsepower.runtime.presets import FOAL_MODELS, ModelName
from horsepower.runtime.quantised_checkpoint import Stored
from horsepower.runtime.released import Models
from horsepower.runtime.source import AudioCodec, ImageEncoder, OobleckCodec, Turbo, VideoDecoder, WanEncoder
from horsepower.runtime.tokens import Grid

TURBO = TurboConfig(decoder_block_out_channels=(8, 16, 24, 32))
WAN_WIDTH, AUDIO_WIDTH = 8, 4


class Foal:
    """The preset's parts, on a device and in the dtype of the matrix products."""

    notes: tuple[str, ...] = ("model: foal has generated, untrained weights; its clips show form, not meaning",)

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device, self._dtype = device, dtype

    def models(self) -> tuple[ModelName, ...]:
        return tuple(FOAL_MODELS)

    def config(self, name: ModelName) -> DiTConfig:
        return FOAL_MODELS[name]

    def stored(self, name: ModelName) -> Stored | None:
        return None

    def weights(self, name: ModelName) -> Values:
        model = DiT(FOAL_MODELS[name], self._dtype)
        generate(model, name)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if key.endswith(("linear_proj.weight", "down_proj.weight")):
                    weight.mul_(0.2)  # 80 branches of unit size would drown the embeddings
        return weights_of(model)

    def text_encoder(self) -> TextEncoder:
        return HashedWordEncoder(self.text_width(), device=self._device)

    def text_width(self) -> int:
        return FOAL_MODELS["base"].text_in_channels

    def text_memory(self) -> PartBytes:
        return memory.hashed_word_bytes(self.text_width())

    def image_encoder(self) -> ImageEncoder:
        vae = wan_vae.build("cpu", self._dtype, encoder_width=WAN_WIDTH, decoder_width=WAN_WIDTH)
        generate(vae, "image")
        return WanEncoder(wan_vae.halved(vae, "encoder")).to(self._device)

    def image_memory(self, size: tuple[int, int]) -> PartBytes:
        weights = memory.wan_weights("encoder", (WAN_WIDTH, WAN_WIDTH), self._dtype)
        return PartBytes(weights, memory.wan_encode_bytes(WAN_WIDTH, size, self._dtype))

    def video_decoder(self) -> VideoDecoder:
        decoder = TurboDecoder(TURBO)
        generate(decoder, "video")
        smooth(decoder)
        decoder.to(self._device, self._dtype)
        return Turbo(decoder, self._dtype)

    def video_memory(self, grid: Grid) -> PartBytes:
        return PartBytes(memory.turbo_weights(TURBO, self._dtype), memory.turbo_bytes(TURBO, grid, self._dtype))

    def audio_codec(self) -> AudioCodec:
        vae = audio_vae.build("cpu", encoder_width=AUDIO_WIDTH, decoder_width=AUDIO_WIDTH)
        generate(vae, "audio")
        with torch.no_grad():
            vae.decoder.conv2.weight_g.mul_(0.002)  # a bearable loudness
        return OobleckCodec(vae).to(self._device)

    def audio_memory(self, latents: int, given: bool) -> PartBytes:
        return memory.audio_bytes({"encoder_width": AUDIO_WIDTH, "decoder_width": AUDIO_WIDTH}, latents, given)


class StoredFoal(Foal):
    """The preset with DiTs from a folder, where `horsepower quantize` wrote them."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        super().__init__(device, dtype)
        self._models = Models(folder, device, dtype)

    def models(self) -> tuple[ModelName, ...]:
        return self._models.models()

    def config(self, name: ModelName) -> DiTConfig:
        return self._models.config(name)

    def stored(self, name: ModelName) -> Stored | None:
        return self._models.stored(name)

    def weights(self, name: ModelName) -> Values:
        return self._models.weights(name)


def generate(module: nn.Module, name: str) -> None:
    """Fill a module on the CPU: matrices that keep the variance, norms and biases that do nothing.

    The same for the same name wherever torch draws the same normal numbers; its global generator is not touched.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            leaf = key.rpartition(".")[2]
            if leaf in ("gamma", "weight_g"):
                parameter.fill_(1)
            elif parameter.ndim == 1 or leaf in ("alpha", "beta"):
                parameter.zero_()
            else:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * values[0].numel() ** -0.5)
    module.eval().requires_grad_(False)


@torch.no_grad()
def smooth(decoder: TurboDecoder) -> None:
    """Make every convolution of a generated decoder a blur, so that latents become clouds of colour, not static."""
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            weight = module.weight
            kernel = tuple(range(2, weight.ndim))
            weight.copy_(weight.mean(kernel, keepdim=True) if weight[0, 0].numel() > 1 else weight)
    out = decoder.decoder.conv_out.conv.weight
    out.copy_(out[::4].repeat_interleave(4, dim=0))  # one colour for the pixels of a patch
