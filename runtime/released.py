"""A folder of released checkpoints, under the names in which they are published.

base/ distill/ 540p_sr/ 1080p_sr/   the DiTs, safetensors with an index; config.json only for other sizes
turbo_vae/                          the Turbo decoder: its JSON, and its checkpoint converted to safetensors
Wan2.2-TI2V-5B/                     Wan2.2_VAE.safetensors (converted), or vae/ as diffusers has it
stable-audio-open-1.0/              model.safetensors and model_config.json, or vae/ as diffusers has it
t5gemma-9b-9b-ul2/                  the text encoder, as transformers has it

DiTs may be quantised ones (`quantised_checkpoint`).
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from horsepower.quant.quantised import Values
from horsepower.runtime import memory
from horsepower.runtime.checkpoint import INDEX, SINGLE, Tensors, Weights, load, read_json
from horsepower.runtime.memory import PartBytes
from horsepower.runtime.models import audio_vae, wan_vae
from horsepower.runtime.models.dit import DiT, FourierRope
from horsepower.runtime.models.dit_config import DiTConfig
from horsepower.runtime.models.text import (
    READ_TOKENS,
    T5GemmaEncoder,
    TextEncoder,
    t5gemma_config,
    t5gemma_on_meta,
)
from horsepower.runtime.models.turbo_vae import TurboConfig, TurboDecoder
from horsepower.runtime.presets import MODELS, ModelName
from horsepower.runtime.quantised_checkpoint import Stored, StoredTensors
from horsepower.runtime.source import (
    AudioCodec,
    ImageEncoder,
    OobleckCodec,
    Turbo,
    VideoDecoder,
    WanDecoder,
    WanEncoder,
)
from horsepower.runtime.tokens import Grid

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from transformers import T5GemmaConfig

TEXT, TURBO, WAN, AUDIO = "t5gemma-9b-9b-ul2", "turbo_vae", "Wan2.2-TI2V-5B", "stable-audio-open-1.0"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
AUDIO_PREFIX = "pretransform.model."


class ReleasedSizes:
    """What the parts of the release take, in a dtype of the matrix products: as published, without any files."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype

    def config(self, name: ModelName) -> DiTConfig:
        return MODELS[name]

    def text_width(self) -> int:
        width: int = self._t5gemma_config().encoder.hidden_size
        return width

    def text_memory(self) -> PartBytes:
        return self._text_memory

    @cached_property
    def _text_memory(self) -> PartBytes:
        config = self._t5gemma_config()
        weights = memory.module_bytes(t5gemma_on_meta(config))
        return PartBytes(weights, memory.t5gemma_bytes(config.encoder, READ_TOKENS))

    def image_memory(self, size: tuple[int, int]) -> PartBytes:
        weights = memory.wan_weights("encoder", self._wan_widths, self._dtype)
        return PartBytes(weights, memory.wan_encode_bytes(self._wan_widths[0], size, self._dtype))

    def video_memory(self, grid: Grid) -> PartBytes:
        if (config := self._turbo_config()) is None:
            weights = memory.wan_weights("decoder", self._wan_widths, self._dtype)
            return PartBytes(weights, memory.wan_decode_bytes(self._wan_widths[1], grid, self._dtype))
        return PartBytes(memory.turbo_weights(config, self._dtype), memory.turbo_bytes(config, grid, self._dtype))

    def audio_memory(self, latents: int, given: bool) -> PartBytes:
        return memory.audio_bytes(self._audio_config(), latents, given)

    def _t5gemma_config(self) -> "T5GemmaConfig":
        return t5gemma_config()

    def _turbo_config(self) -> TurboConfig | None:
        """None: Wan's own decoder is taken."""
        return TurboConfig()

    @cached_property
    def _wan_widths(self) -> tuple[int, int]:
        """Of the encoder's first layer and the decoder's last."""
        return 160, 256

    def _audio_config(self) -> dict[str, Any]:
        """As `audio_vae.build` takes it."""
        return {"encoder_width": 128, "decoder_width": 128}


class Models:
    """The folder's DiTs, on a device and in the dtype of the matrix products. ValueErrors name what is wrong."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        self._folder, self._device, self._dtype = folder, device, dtype

    def models(self) -> tuple[ModelName, ...]:
        return tuple(n for n in MODELS if any((self._folder / n / file).exists() for file in (INDEX, SINGLE)))

    def config(self, name: ModelName) -> DiTConfig:
        file = self._folder / name / "config.json"
        return DiTConfig.from_dict(read_json(file)) if file.exists() else MODELS[name]

    def stored(self, name: ModelName) -> Stored | None:
        found = Stored.of(self._folder / name)
        return None if found is None else found.check(name, self.config(name))

    def weights(self, name: ModelName) -> Values:
        config, files = self.config(name), Weights.find(self._folder / name)
        model = DiT(config, self._dtype, "meta")
        if (stored := self.stored(name)) is not None:
            return StoredTensors(model, files, stored, self._device)
        bands = FourierRope(config.head_dim, torch.float32, "cpu").bands
        return Tensors(model, files, self._device, defaults={"adapter.rope.bands": bands})


class ReleasedFolder(Models, ReleasedSizes):
    """The folder's parts, and what they take."""

    notes: tuple[str, ...] = ()

    def text_encoder(self) -> TextEncoder:
        return T5GemmaEncoder(self._part(TEXT), self._device)

    def image_encoder(self) -> ImageEncoder:
        return WanEncoder(self._wan("encoder"))

    def video_decoder(self) -> VideoDecoder:
        """The Turbo decoder if its folder is there, else Wan's own."""
        if (config := self._turbo_config()) is None:
            return WanDecoder(self._wan("decoder"))
        with torch.device("meta"):
            decoder = TurboDecoder(config).to(self._dtype)
        weights, known = _safetensors(self._part(TURBO)), set(decoder.state_dict())
        bare = not any(key.startswith(("decoder.", "encoder.")) for key in weights.files)

        def rename(key: str) -> str | None:
            name = f"decoder.{key}" if bare else key
            return name if name in known else None  # what training left behind

        load(decoder, weights, self._device, rename)
        return Turbo(decoder.eval(), self._dtype)

    def audio_codec(self) -> AudioCodec:
        folder, vae = self._part(AUDIO), audio_vae.build("meta", **self._audio_config())
        if (converted := folder / "vae").is_dir():
            load(vae, Weights.find(converted / DIFFUSERS_WEIGHTS), self._device)
            return OobleckCodec(vae)

        def rename(key: str) -> str | None:
            ours = key.startswith(AUDIO_PREFIX)
            return audio_vae.rename(key.removeprefix(AUDIO_PREFIX)) if ours else None

        load(vae, Weights.find(folder), self._device, rename)
        return OobleckCodec(vae)

    def _t5gemma_config(self) -> "T5GemmaConfig":
        return t5gemma_config(self._part(TEXT))

    def _turbo_config(self) -> TurboConfig | None:
        if not (self._folder / TURBO).is_dir():
            return None
        return TurboConfig.from_dict(read_json(_only(self._part(TURBO), "*.json")))

    def _audio_config(self) -> dict[str, Any]:
        folder = self._part(AUDIO)
        if (converted := folder / "vae").is_dir():
            return audio_vae.config_from_diffusers(read_json(converted / "config.json"))
        return audio_vae.config_from_stable_audio(read_json(folder / "model_config.json"))

    def _wan(self, half: wan_vae.Half) -> "AutoencoderKLWan":
        encoder_width, decoder_width = self._wan_widths
        vae = wan_vae.build("meta", self._dtype, encoder_width=encoder_width, decoder_width=decoder_width)
        wan_vae.halved(vae, half)
        weights, rename = self._wan_files()
        theirs = tuple(f"{name}." for name in (wan_vae.ENCODER if half == "decoder" else wan_vae.DECODER))
        load(vae, weights, self._device, lambda key: None if (name := rename(key)).startswith(theirs) else name)
        return vae

    def _wan_files(self) -> tuple[Weights, Callable[[str], str]]:
        """And the names of their keys in diffusers' class."""
        folder = self._part(WAN)
        if (folder / "vae").is_dir():
            return Weights.find(folder / "vae" / DIFFUSERS_WEIGHTS), lambda key: key
        return _safetensors(folder), wan_vae.rename

    @cached_property
    def _wan_widths(self) -> tuple[int, int]:
        weights, rename = self._wan_files()
        shapes = {rename(key): shape for key, shape in weights.shapes().items()}
        try:
            return shapes["encoder.conv_in.weight"][0], shapes["decoder.conv_out.weight"][1]
        except KeyError as error:
            raise ValueError(f"checkpoint {weights.source}: is missing {error}, allowed: those of Wan2.2") from None

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
