"""The same few clips by whatever model: prompts and noise are fixed, and so is what super-resolution begins with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from horsepower.runtime.fused import FusedDiT
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.phases import SUPER_RESOLUTION
from horsepower.runtime.pipeline import BaseGuidance, Latents, Stage, Texts, denoise, prepare, super_resolve
from horsepower.runtime.presets import ModelName
from horsepower.runtime.prompts import DEFAULT_NEGATIVE_PROMPT
from horsepower.runtime.sampling import SeededNoise
from horsepower.runtime.source import Source
from horsepower.runtime.tokens import FPS, Grid
from horsepower.runtime.watch import Watch

PROMPTS = (
    "A grey mare trots along a beach at dawn, low sun behind her, spray around her hooves; the camera glides beside "
    "her. Background Sound: surf, a gull, hooves on wet sand.",
    "In a small workshop an old watchmaker bends over an open clock, turns to the camera and says in a quiet voice "
    "that patience is the only tool which never wears out. Background Sound: many clocks ticking, rain on the window.",
)
STAGES: dict[ModelName, Stage] = {
    "distill": Stage("base", 8, "distilled"),
    "base": Stage("base", 8, "unipc", BaseGuidance()),
    "540p_sr": SUPER_RESOLUTION,
    "1080p_sr": SUPER_RESOLUTION,
}


class Clips:
    """What a kind of model makes of prompts: final latents, the same for the same model."""

    def __init__(
        self,
        source: Source,
        name: ModelName,
        device: torch.device,
        size: tuple[int, int],
        seconds: int,
        prompts: Sequence[str] = PROMPTS,
    ):
        """size: width and height in pixels, multiples of 64; super-resolution begins at half of them."""
        self.stage, self._device, self.prompts = STAGES[name], device, prompts
        width, height = size
        self.grid = Grid.of(width, height, seconds * FPS + 1)
        self._half = Grid.of(width // 2, height // 2, self.grid.audio)
        encoder = source.text_encoder()
        negative = encoder(DEFAULT_NEGATIVE_PROMPT).features
        self._texts = [Texts(encoder(prompt).features, negative) for prompt in prompts]
        self._starts: list[Latents] | None = None

    def begin(self, name: ModelName, model: DiT) -> None:
        """Let a model of the base stage make what super-resolution begins with."""
        self._starts = [self._base(model, STAGES[name], i, self._half) for i in range(len(self.prompts))]

    def run(self, model: DiT | FusedDiT) -> list[Latents]:
        """A clip a prompt."""
        if self.stage is not SUPER_RESOLUTION:
            return [self._base(model, self.stage, i, self.grid) for i in range(len(self.prompts))]
        assert self._starts is not None
        with torch.no_grad():
            return [
                super_resolve(model, start, self.grid, text, self.stage, SeededNoise(i), Watch(self._device))
                for i, (start, text) in enumerate(zip(self._starts, self._texts, strict=True))
            ]

    def _base(self, model: DiT | FusedDiT, stage: Stage, i: int, grid: Grid) -> Latents:
        noise = SeededNoise(i)
        with torch.no_grad():
            start = prepare(grid, noise, self._device)
            return denoise(model, start, self._texts[i], stage, noise, Watch(self._device))


def distance(got: Sequence[Latents], want: Sequence[Latents]) -> tuple[float, float]:
    """Relative L2 of video and of audio, each the worst of the clips."""
    pairs = [*zip(got, want, strict=True)]
    video, audio = ([_relative(getattr(a, kind), getattr(b, kind)) for a, b in pairs] for kind in ("video", "audio"))
    return max(video), max(audio)


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
