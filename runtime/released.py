"""A folder of released checkpoints, under the names in which they are published.

base/ distill/ 540p_sr/ 1080p_sr/   the DiTs, safetensors with an index; config.json only for other sizes
turbo_vae/                          the Turbo decoder: its JSON, and its checkpoint converted to safetensors
Wan2.2-TI2V-5B/                     Wan2.2_VAE.safetensors (converted), or vae/ as diffusers has it
stable-audio-open-1.0/              model.safetensors and model_config.json, or vae/ as diffusers has it
t5gemma-9b-9b-ul2/                  the text encoder, as transformers has it
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from horsepower.runtime.checkpoint import INDEX, SINGLE, Tensors, Weights, load, read_json
from horsepower.runtime.memory import turbo_bytes, wan_bytes
from horsepower.runtime.models import audio_vae, wan_vae
from horsepower.runtime.models.dit import DiT, FourierRope
from horsepower.runtime.models.dit_config import DiTConfig
from horsepower.runtime.models.text import T5GemmaEncoder, TextEncoder
from horsepower.runtime.models.turbo_vae import TurboConfig, TurboDecoder
from horsepower.runtime.presets import MODELS, ModelName
from horsepower.runtime.source import AudioCodec, ImageEncoder, OobleckCodec, VideoDecoder
from horsepower.runtime.tokens import Grid

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

TEXT, TURBO, WAN, AUDIO = "t5gemma-9b-9b-ul2", "turbo_vae", "Wan2.2-TI2V-5B", "stable-audio-open-1.0"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
AUDIO_PREFIX = "pretransform.model."


class ReleasedFolder:
    """The folder's parts, on a device and in the dtype of the matrix products. ValueErrors name what is wrong."""

    notes: tuple[str, ...] = ()

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        self._folder, self._device, self._dtype = folder, device, dtype

    def models(self) -> tuple[ModelName, ...]:
        return tuple(n for n in MODELS if any((self._folder / n / file).exists() for file in (INDEX, SINGLE)))

    def config(self, name: ModelName) -> DiTConfig:
        file = self._folder / name / "config.json"
        return DiTConfig.from_dict(read_json(file)) if file.exists() else MODELS[name]

    def weights(self, name: ModelName) -> Mapping[str, Tensor]:
        config = self.config(name)
        bands = FourierRope(config.head_dim, torch.float32, "cpu").bands
        files = Weights.find(self._folder / name)
        return Tensors(DiT(config, self._dtype, "meta"), files, self._device, defaults={"adapter.rope.bands": bands})

    def text_encoder(self) -> TextEncoder:
        return T5GemmaEncoder(self._part(TEXT), self._device)

    def image_encoder(self) -> ImageEncoder:
        vae = self._wan
        return lambda pixels: wan_vae.encode(vae, pixels)

    def video_decoder(self) -> VideoDecoder:
        """The Turbo decoder if its folder is there, else Wan's own."""
        if not (self._folder / TURBO).is_dir():
            vae = self._wan
            return lambda latents: [wan_vae.decode(vae, latents)]
        folder = self._part(TURBO)
        with torch.device("meta"):
            decoder = TurboDecoder(self._turbo_config()).to(self._dtype)
        weights, known = _safetensors(folder), set(decoder.state_dict())
        bare = not any(key.startswith(("decoder.", "encoder.")) for key in weights.files)

        def rename(key: str) -> str | None:
            name = f"decoder.{key}" if bare else key
            return name if name in known else None  # what training left behind

        load(decoder, weights, self._device, rename)
        decoder.eval()
        return lambda latents: decoder.decode_chunks(latents.to(self._dtype))  # rounded before the de-normalisation

    def decode_bytes(self, grid: Grid) -> int:
        if not (self._folder / TURBO).is_dir():
            return wan_bytes(grid, self._dtype)
        return turbo_bytes(self._turbo_config(), grid, self._dtype)

    def audio_codec(self) -> AudioCodec:
        folder = self._part(AUDIO)
        if (converted := folder / "vae").is_dir():
            vae = audio_vae.build("meta", **audio_vae.config_from_diffusers(read_json(converted / "config.json")))
            load(vae, Weights.find(converted / DIFFUSERS_WEIGHTS), self._device)
            return OobleckCodec(vae)
        vae = audio_vae.build("meta", **audio_vae.config_from_stable_audio(read_json(folder / "model_config.json")))

        def rename(key: str) -> str | None:
            ours = key.startswith(AUDIO_PREFIX)
            return audio_vae.rename(key.removeprefix(AUDIO_PREFIX)) if ours else None

        load(vae, Weights.find(folder), self._device, rename)
        return OobleckCodec(vae)

    def _turbo_config(self) -> TurboConfig:
        return TurboConfig.from_dict(read_json(_only(self._part(TURBO), "*.json")))

    @cached_property
    def _wan(self) -> "AutoencoderKLWan":
        folder = self._part(WAN)
        converted = (folder / "vae").is_dir()
        weights = Weights.find(folder / "vae" / DIFFUSERS_WEIGHTS) if converted else _safetensors(folder)
        rename = (lambda key: key) if converted else wan_vae.rename
        shapes = {rename(key): shape for key, shape in weights.shapes().items()}
        try:
            encoder_width, decoder_width = shapes["encoder.conv_in.weight"][0], shapes["decoder.conv_out.weight"][1]
        except KeyError as error:
            raise ValueError(f"checkpoint {weights.source}: is missing {error}, allowed: those of Wan2.2") from None
        vae = wan_vae.build("meta", self._dtype, encoder_width=encoder_width, decoder_width=decoder_width)
        load(vae, weights, self._device, rename)
        return vae

    def _part(self, name: str) -> Path:
        folder = self._folder / name
        if not folder.is_dir():
            raise ValueError(f"folder: got {self._folder} without {name}, allowed: a folder that holds it")
        return folder


def _safetensors(folder: Path) -> Weights:
    """The one safetensors file of a part that is published as a pickle."""
    pickles = sorted(file.name for pattern in ("*.ckpt", "*.pth", "*.pt") for file in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"checkpoint {folder}: got {pickles[0]}, which is a pickle, allowed: safetensors; "
            f"`horsepower convert {folder / pickles[0]}` makes them"
        )
    return Weights.find(_only(folder, "*.safetensors"))


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"folder {folder}: got {names}, allowed: exactly one {pattern}")
    return found[0]
