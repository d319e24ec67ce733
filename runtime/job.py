"""A request while it is worked on: from the prompt to frames and sound, phase by phase."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from horsepower.runtime.fused import FusedDiT
from horsepower.runtime.media import image_pixels, open_image, read_audio
from horsepower.runtime.models.audio_vae import CODEC_RATE, STRIDE
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.text import TextEncoder
from horsepower.runtime.phases import AUDIO, IMAGE, TEXT, VIDEO, audio_latents, super_resolution_stage
from horsepower.runtime.pipeline import Latents, Stage, Texts, denoise, prepare, super_resolve, to_frames
from horsepower.runtime.presets import ModelName, Sizes
from horsepower.runtime.prompts import DEFAULT_NEGATIVE_PROMPT, structured_prompt
from horsepower.runtime.request import Request
from horsepower.runtime.residence import Residence
from horsepower.runtime.sampling import Noise
from horsepower.runtime.source import AudioCodec, ImageEncoder, VideoDecoder
from horsepower.runtime.te_dit import Scales
from horsepower.runtime.tokens import Grid
from horsepower.runtime.turns import MemoryStatement, Part
from horsepower.runtime.watch import Watch

if TYPE_CHECKING:
    from PIL.Image import Image


class Conditions(NamedTuple):
    """What a request gives beside its text, as latents: a frame for each stage's size, and sound."""

    base_image: Tensor | None
    final_image: Tensor | None
    audio: Tensor | None


@dataclass(frozen=True)
class Job:
    """What one request needs of its engine, which holds still meanwhile."""

    request: Request
    model: ModelName  # of the base stage
    picture: Sizes
    stage: Stage  # the base stage
    device: torch.device
    statement: MemoryStatement
    sizes: Mapping[str, Part]  # of the parts that it takes, and of others that are there
    parts: Residence
    scales: Scales
    noise: Noise
    watch: Watch

    def latents(self) -> tuple[Latents, tuple[str, ...]]:
        """All stages before the decoders; and what is to be said of the prompt. Raises Cancelled, and ValueError."""
        texts, notes = self._read()
        given = self._condition()
        latents = self._denoise(texts, given)
        if self.picture.super_resolution:
            latents = self._super_resolve(latents, texts, given)
        return latents, notes

    def decode(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """Frames uint8 [F, H, W, 3] and sound float32 [S, 2], on the CPU."""
        grid = latents.grid
        width, height = grid.pixels
        with self._phase("video"):
            decoder: VideoDecoder = self.parts[VIDEO]
            video = to_frames(decoder(latents.video), (4 * grid.frames - 3, height, width))
        with self._phase("audio"):
            codec: AudioCodec = self.parts[AUDIO]
            return video, codec.decode(latents.audio).cpu()

    def _read(self) -> tuple[Texts, tuple[str, ...]]:
        """Encode the prompts; and say if the prompt had to be cut."""
        request, guided_later = self.request, self.request.super_resolution_guidance is not None
        with self._phase("text"):
            prompt = structured_prompt(request.prompt, request.speech_text, request.speech_language)
            encoder: TextEncoder = self.parts[TEXT]
            encoded, negative = encoder(prompt), None
            if self.stage.guidance is not None or guided_later:
                negative = encoder(request.negative_prompt or DEFAULT_NEGATIVE_PROMPT).features
        kept = len(encoded.features)
        cut = (f"prompt: {encoded.total_tokens} tokens, of which the first {kept} were used",)
        return Texts(encoded.features, negative), cut if encoded.total_tokens > kept else ()

    def _condition(self) -> Conditions:
        """Encode the given image and sound, if any; sound first, since it draws noise."""
        request, picture = self.request, self.picture
        if request.image is None and request.audio is None:
            return Conditions(None, None, None)
        with self._phase("conditioning"):
            audio = base_image = final_image = None
            if request.audio is not None:
                wave = read_audio(request.audio, request.duration)
                if len(wave) < STRIDE:
                    got = f"{len(wave) / CODEC_RATE:.3f} seconds of sound"
                    raise ValueError(f"audio: got {got}, allowed: at least {STRIDE / CODEC_RATE}")
                codec: AudioCodec = self.parts[AUDIO]
                audio = codec.encode(wave.expand(2, -1).to(self.device), self.noise)
            if request.image is not None:
                image = open_image(request.image)
                base_image = self._encode_image(image, picture.base)
                if picture.super_resolution:
                    final_image = self._encode_image(image, picture.final)
            return Conditions(base_image, final_image, audio)

    def _encode_image(self, image: "Image", size: tuple[int, int]) -> Tensor:
        encoder: ImageEncoder = self.parts[IMAGE]
        return encoder(image_pixels(image, *size).to(self.device))

    def _denoise(self, texts: Texts, given: Conditions) -> Latents:
        """The base stage."""
        request = self.request
        audio = audio_latents(request) if given.audio is None else given.audio.shape[1]
        self._enter(self.stage.name)
        start = prepare(Grid.of(*self.picture.base, audio), self.noise, self.device, given.audio)
        keep_audio = given.audio is not None and (request.keep_audio or self.model == "base")
        model: DiT | FusedDiT = self.parts[self.model]
        latents = denoise(model, start, texts, self.stage, self.noise, self.watch, given.base_image, keep_audio)
        self.scales.keep(self.model, model)
        return latents

    def _super_resolve(self, latents: Latents, texts: Texts, given: Conditions) -> Latents:
        """The super-resolution stage of pictures that have one."""
        picture, stage = self.picture, super_resolution_stage(self.request)
        assert picture.super_resolution
        self._enter(stage.name)
        grid, model = Grid.of(*picture.final, latents.grid.audio), self.parts[picture.super_resolution]
        latents = super_resolve(model, latents, grid, texts, stage, self.noise, self.watch, given.final_image)
        self.scales.keep(picture.super_resolution, model)
        return latents

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A phase of one step: its parts come first, others may have to go."""
        self._enter(name)
        with self.watch.stage(name):
            yield

    def _enter(self, name: str) -> None:
        turn = next(turn for turn in self.statement.turns if turn.phase == name)
        with self.watch.clock(name):
            self.parts.follow(turn, self.sizes)
