"""What each phase of a request needs of a device, from sizes alone: no weights, and nothing is allocated."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from horsepower.runtime.memory import DiTBytes, PartBytes, picture_bytes, stage_bytes
from horsepower.runtime.models.dit_config import DiTConfig
from horsepower.runtime.pipeline import BaseGuidance, Stage, SuperResolutionGuidance
from horsepower.runtime.presets import ModelName, Sizes
from horsepower.runtime.request import Request
from horsepower.runtime.tokens import FPS, Grid
from horsepower.runtime.turns import Part, Phase

BASE = "base"
SUPER_RESOLUTION = Stage("super-resolution", 5, "unipc", coords="v1")
DENOISING = (BASE, SUPER_RESOLUTION.name)  # the phases whose steps are passes of a DiT
TEXT, IMAGE, VIDEO, AUDIO = "text encoder", "image encoder", "video decoder", "audio codec"

# What a DiT takes for a stage of this size, of so many passes a step.
DiTMemory = Callable[[ModelName, Grid, int], DiTBytes]


class PartSizes(Protocol):
    """How large the parts are, known without their weights."""

    def config(self, name: ModelName) -> DiTConfig: ...

    def text_width(self) -> int:
        """Of a feature row."""
        ...

    def text_memory(self) -> PartBytes:
        """For the longest prompt."""
        ...

    def image_memory(self, size: tuple[int, int]) -> PartBytes:
        """For a picture of (width, height) pixels."""
        ...

    def video_memory(self, grid: Grid) -> PartBytes: ...

    def audio_memory(self, latents: int, given: bool) -> PartBytes:
        """To decode, and to encode what is `given`."""
        ...


def audio_latents(request: Request) -> int:
    """One a video frame, and one for the end."""
    return int(round(request.duration * FPS, 6)) + 1  # rounded first: 4.6 * 25 is 114.99... in binary


def base_stage(request: Request, model: ModelName) -> Stage:
    """How the base stage runs. Raises ValueError for what only the base model understands."""
    if model == "distill":
        guided_later = request.super_resolution_guidance is not None
        for name in ("guidance", "sampler", *(() if guided_later else ("negative_prompt",))):
            if (value := getattr(request, name)) is not None:
                raise ValueError(f"{name}: got {value!r}, allowed: None with the distilled model")
        return Stage(BASE, request.num_inference_steps or 8, "distilled")
    guidance = BaseGuidance() if request.guidance is None else BaseGuidance(request.guidance, request.guidance)
    return Stage(BASE, request.num_inference_steps or 32, request.sampler or "unipc", guidance)


def super_resolution_stage(request: Request) -> Stage:
    """How super-resolution runs."""
    scale = request.super_resolution_guidance
    return SUPER_RESOLUTION if scale is None else replace(SUPER_RESOLUTION, guidance=SuperResolutionGuidance(scale))


def phases_of(
    request: Request, model: ModelName, picture: Sizes, source: PartSizes, dit: DiTMemory
) -> tuple[dict[str, Part], tuple[Phase, ...]]:
    """The parts that a request needs, and its phases in their order. Raises ValueError as `base_stage`."""
    latents = audio_latents(request)
    grid, audio = Grid.of(*picture.final, latents), source.audio_memory(latents, request.audio is not None)
    text, video = source.text_memory(), source.video_memory(grid)
    parts = {TEXT: Part(text.weights, host_load=text.weights)}  # transformers makes it on the CPU
    phases = [Phase("text", (TEXT,), {TEXT: text.activations})]
    if request.image is not None or request.audio is not None:
        phases.append(_conditioning(request, picture, source, audio, parts))
    denoised: list[tuple[ModelName, tuple[int, int], Stage]] = [(model, picture.base, base_stage(request, model))]
    if picture.super_resolution is not None:
        denoised.append((picture.super_resolution, picture.final, super_resolution_stage(request)))
    for name, size, stage in denoised:
        phases.append(_denoising(name, Grid.of(*size, latents), stage, source, dit, parts))
    parts |= {VIDEO: Part(video.weights), AUDIO: Part(audio.weights)}
    phases += [Phase("video", (VIDEO,), {VIDEO: video.activations})]
    phases += [Phase("audio", (AUDIO,), {AUDIO: audio.activations})]
    return parts, tuple(phases)


def with_frames(phases: tuple[Phase, ...], grid: Grid) -> tuple[Phase, ...]:
    """The same where the device is the CPU, so that the finished frames lie there too."""
    frames = picture_bytes(grid)
    return tuple(
        Phase(each.name, each.needs, {name: size + frames for name, size in each.activations.items()})
        if each.name in ("video", "audio")
        else each
        for each in phases
    )


def _conditioning(
    request: Request, picture: Sizes, source: PartSizes, audio: PartBytes, parts: dict[str, Part]
) -> Phase:
    activations = {}
    if request.audio is not None:
        parts[AUDIO], activations[AUDIO] = Part(audio.weights), audio.activations
    if request.image is not None:
        image = source.image_memory(picture.final)
        parts[IMAGE], activations[IMAGE] = Part(image.weights), image.activations
    return Phase("conditioning", tuple(activations), activations)


def _denoising(
    name: ModelName, grid: Grid, stage: Stage, source: PartSizes, dit: DiTMemory, parts: dict[str, Part]
) -> Phase:
    passes = 1 if stage.guidance is None else 2
    size = dit(name, grid, passes)
    parts[name] = Part(size.weights, size.load)
    needs: tuple[str, ...] = (name,)
    if size.arena:
        parts[arena := arena_of(name)] = Part(size.arena, arena_of=name)
        needs = (name, arena)
    beside = size.beside + stage_bytes(source.config(name), grid, stage.sampler, passes)
    return Phase(stage.name, needs, {name: beside})


def arena_of(name: str) -> str:
    """The name of the part that is a model's scratch memory."""
    return f"{name} arena"
