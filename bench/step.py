"""One step of a preset's model, at the token counts that a user asks about."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from horsepower.runtime.engine import Engine
from horsepower.runtime.foal import Foal
from horsepower.runtime.models.dit import Counts, DiT
from horsepower.runtime.presets import FOAL_MODELS, MODELS
from horsepower.runtime.source import eager_dit
from horsepower.runtime.tokens import PATCH, Grid, coordinates


@dataclass(frozen=True)
class Tokens:
    """Tokens of video, audio and text; the video ones make up `frames` equal latent frames.

    Raises ValueError for what does not fit.
    """

    video: int
    audio: int
    text: int
    frames: int = 1

    def __post_init__(self) -> None:
        if min(self.audio, self.text) < 0 or self.video < 1:
            raise ValueError(f"tokens: got {self}, allowed: at least 1,0,0")
        if self.frames < 1 or self.video % self.frames:
            raise ValueError(f"frames: got {self.frames} for {self.video} video tokens, allowed: a divisor of them")

    def __str__(self) -> str:
        return f"{self.video},{self.audio},{self.text}"

    @property
    def counts(self) -> Counts:
        return self.video, self.audio, self.text

    @property
    def total(self) -> int:
        return self.video + self.audio + self.text

    @classmethod
    def parse(cls, counts: str, frames: int) -> "Tokens":
        """From V,A,T as on the command line. Raises ValueError."""
        parts = counts.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(
                f"tokens: got {counts!r}, allowed: three counts V,A,T (video, audio, text), such as 446,26,40"
            )
        video, audio, text = map(int, parts)
        return cls(video, audio, text, frames)

    def scaled(self, total: int) -> "Tokens":
        """At most about `total` tokens in the same frames, every modality that is there kept."""
        share = min(1.0, total / self.total)
        video = max(1, int(self.video // self.frames * share)) * self.frames
        audio, text = (min(n, max(1, int(n * share))) for n in (self.audio, self.text))
        return Tokens(video, audio, text, self.frames)


def preset(name: str, device: str = "cpu") -> DiT:
    """A model of the built-in preset, in the dtype that the engine runs it in on that device. Raises ValueError."""
    if name not in FOAL_MODELS:
        raise ValueError(f"variant: got {name!r}, allowed: {', '.join(FOAL_MODELS)}")
    engine = Engine.from_pretrained("foal", device=device, mode="eager")
    return eager_dit(Foal(engine.device, engine.dtype), name, engine.device, engine.dtype)


def released(name: str) -> DiT:
    """A model of the released size, on the meta device. Raises ValueError."""
    if name not in MODELS:
        raise ValueError(f"variant: got {name!r}, allowed: {', '.join(MODELS)}")
    return DiT(MODELS[name], device="meta")


def inputs(model: DiT, tokens: Tokens) -> tuple[Any, ...]:
    """Arguments of `model.velocity`: noise as in the first step, random text, the coordinates of such a clip."""
    generator = torch.Generator().manual_seed(0)
    config, like = model.config, model.final_linear_video.weight

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(like)

    video, audio = normal(tokens.video, config.video_in_channels), normal(tokens.audio, config.audio_in_channels)
    place = tokens.video // tokens.frames
    rows = max(n for n in range(1, math.isqrt(place) + 1) if place % n == 0)
    grid = Grid(tokens.frames, rows * PATCH, place // rows * PATCH, tokens.audio)
    with torch.no_grad():
        condition = model.condition(
            normal(tokens.text, config.text_in_channels), coordinates(grid, tokens.text).to(like.device)
        )
    return video, audio, condition, tokens.frames
