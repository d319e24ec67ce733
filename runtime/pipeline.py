"""From noise and conditions to a clip: prepare, denoise, super-resolve, decode, as free functions."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from horsepower.runtime.fused import FusedDiT
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.sampling import Noise, SamplerName, sampler, schedule, zero_snr_signal
from horsepower.runtime.tokens import CoordsStyle, Grid, coordinates, patchify, unpatchify
from horsepower.runtime.watch import Watch


@dataclass(frozen=True)
class Latents:
    """A clip between stages, float32: video [1, 48, T, h, w], audio [1, A, 64]."""

    video: Tensor
    audio: Tensor

    @property
    def grid(self) -> Grid:
        _, _, frames, height, width = self.video.shape
        return Grid(frames, height, width, self.audio.shape[1])


@dataclass(frozen=True)
class Texts:
    """Encoded prompts, float32 [n, width]; the negative one is read under guidance only."""

    prompt: Tensor
    negative: Tensor | None = None


class Guidance(Protocol):
    """Scales of classifier-free guidance for video (a number, or one per latent frame [T, 1, 1]) and audio."""

    def __call__(self, timestep: int, frames: int) -> tuple[float | Tensor, float]: ...


@dataclass(frozen=True)
class BaseGuidance:
    """Full guidance while the noise is high, little after that."""

    video: float = 5.0
    audio: float = 5.0

    def __call__(self, timestep: int, frames: int) -> tuple[float | Tensor, float]:
        return (self.video if timestep > 500 else 2.0), self.audio


@dataclass(frozen=True)
class SuperResolutionGuidance:
    """Weaker guidance on the first frames, which would be over-exposed otherwise. Audio is not guided."""

    video: float = 3.5
    first_frames: int = 13
    first_value: float = 2.0

    def __call__(self, timestep: int, frames: int) -> tuple[float | Tensor, float]:
        scale = torch.full((frames, 1, 1), self.video)
        scale[: self.first_frames] = min(self.first_value, self.video)
        return scale, 1.0


@dataclass(frozen=True)
class Stage:
    """How one model denoises a clip. Without guidance a step is one forward pass, with it two."""

    name: str
    steps: int
    sampler: SamplerName
    guidance: Guidance | None = None
    coords: CoordsStyle = "v2"
    shift: float = 5.0


@dataclass(frozen=True)
class Upscale:
    """How base latents are noised for super-resolution."""

    noise_index: int = 220  # into the table of signal coefficients; 0: no noise
    audio_noise: float = 0.7


def prepare(grid: Grid, noise: Noise, device: torch.device | str, audio: Tensor | None = None) -> Latents:
    """The start of the base stage: noise for the video, and for the audio unless its latents [1, A, 64] are given."""
    audio = noise(grid.audio_shape) if audio is None else audio
    return Latents(noise(grid.video_shape).to(device), audio.to(device))


def denoise(
    model: DiT | FusedDiT,
    latents: Latents,
    texts: Texts,
    stage: Stage,
    noise: Noise,
    watch: Watch,
    image: Tensor | None = None,
    keep_audio: bool = False,
) -> Latents:
    """Walk one stage's schedule on the device of the latents.

    image: a latent frame [1, 48, 1, h, w] that replaces the first one before every step and at the end.
    keep_audio: audio is a condition and stays as it is.
    """
    plan = schedule(stage.steps, stage.shift)

    def draw(x: Tensor) -> Tensor:
        return noise(x.shape).to(x.device)

    video_sampler, audio_sampler = (sampler(stage.sampler, plan, draw) for _ in range(2))
    predict = _predictor(model, latents, texts, stage)
    video, audio = latents.video, latents.audio
    for i in watch.steps(stage.name, plan.steps):
        video = _with_first_frame(video, image)
        v_video, v_audio = predict(video, audio, plan.timesteps[i])
        video = video_sampler.step(i, video, v_video)
        if not keep_audio:
            audio = audio_sampler.step(i, audio, v_audio)
    return Latents(_with_first_frame(video, image), audio)


def _predictor(
    model: DiT | FusedDiT, latents: Latents, texts: Texts, stage: Stage
) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """The velocity as a function of video, audio and timestep; what is constant over the stage is computed here."""
    grid, device = latents.grid, latents.video.device

    def conditioned(text: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        coords = coordinates(grid, len(text), stage.coords).to(device)
        condition = model.condition(text.to(device), coords)

        def forward(video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
            v_video, v_audio = model.velocity(patchify(video), audio[0], condition, grid.frames)
            return unpatchify(v_video, grid.frames, grid.rows, grid.columns), v_audio[None]

        return forward

    prompted = conditioned(texts.prompt)
    guidance = stage.guidance
    if guidance is None:
        return lambda video, audio, timestep: prompted(video, audio)
    if texts.negative is None:
        raise ValueError("texts.negative: got None, allowed: an encoded negative prompt, which guidance needs")
    unprompted = conditioned(texts.negative)

    def guided(video: Tensor, audio: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        (c_video, c_audio), (u_video, u_audio) = prompted(video, audio), unprompted(video, audio)
        video_scale, audio_scale = guidance(timestep, grid.frames)
        if isinstance(video_scale, Tensor):
            video_scale = video_scale.to(device)
        return u_video + video_scale * (c_video - u_video), u_audio + audio_scale * (c_audio - u_audio)

    return guided


def _with_first_frame(video: Tensor, image: Tensor | None) -> Tensor:
    return video if image is None else torch.cat((image, video[:, :, 1:]), dim=2)


def upscale(latents: Latents, grid: Grid, noise: Noise, settings: Upscale) -> Latents:
    """Base latents at the size of `grid` and noised: the start of the super-resolution stage."""
    device = latents.video.device
    video = F.interpolate(
        latents.video, size=(grid.frames, grid.height, grid.width), mode="trilinear", align_corners=True
    )
    if settings.noise_index:
        signal = float(zero_snr_signal()[settings.noise_index])
        video = signal * video + math.sqrt(1 - signal**2) * noise(video.shape).to(device)
    fresh = noise(latents.audio.shape).to(device)
    audio = settings.audio_noise * fresh + (1 - settings.audio_noise) * latents.audio
    return Latents(video, audio)


def super_resolve(
    model: DiT | FusedDiT,
    latents: Latents,
    grid: Grid,
    texts: Texts,
    stage: Stage,
    noise: Noise,
    watch: Watch,
    image: Tensor | None = None,
    settings: Upscale = Upscale(),
) -> Latents:
    """Video at the size of `grid`; the audio of the base stage, which the model only listens to."""
    start = upscale(latents, grid, noise, settings)
    finished = denoise(model, start, texts, stage, noise, watch, image, keep_audio=True)
    return replace(finished, audio=latents.audio)


def to_frames(chunks: Iterable[Tensor], shape: tuple[int, int, int]) -> Tensor:
    """Decoded chunks [1, 3, f, H, W] in [-1, 1] -> uint8 [F, H, W, 3] on the CPU, truncated as the released code does.

    Converted where it was decoded: a quarter of the bytes travel, and no clip is held in floating point.
    """
    frames = torch.empty(*shape, 3, dtype=torch.uint8)
    start = 0
    for chunk in chunks:
        pixels = (chunk[0].float() * 0.5).add_(0.5).clamp_(0, 1).mul_(255)
        end = start + pixels.shape[1]
        frames[start:end] = pixels.to(torch.uint8).permute(1, 2, 3, 0)
        start = end
    if start != shape[0]:
        raise RuntimeError(f"decoder gave {start} frames where the latents hold {shape[0]}")
    return frames
