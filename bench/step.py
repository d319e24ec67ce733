"""One step of a preset's model, at the token counts that a user asks about."""

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from horsepower.runtime.engine import Engine
from horsepower.runtime.executor import weights_of
from horsepower.runtime.foal import Foal
from horsepower.runtime.models.dit import Counts, DiT, FourierRope
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

    @property
    def grid(self) -> Grid:
        """Of such a clip, its frames as square as can be."""
        place = self.video // self.frames
        rows = max(n for n in range(1, math.isqrt(place) + 1) if place % n == 0)
        return Grid(self.frames, rows * PATCH, place // rows * PATCH, self.audio)

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


class RandomWeights(Mapping[str, Tensor]):
    """Values for a DiT by name, each made on a device whenever it is asked for: no two need to be there at once.

    The same for the same name and seed on devices that draw alike. Matrices keep the variance of what they multiply.
    """

    def __init__(self, model: DiT, device: torch.device | str, seed: int = 0):
        """`model` may be on the meta device."""
        self._like, self._config, self._device, self._seed = weights_of(model), model.config, device, seed

    def __getitem__(self, name: str) -> Tensor:
        like = self._like[name]
        if name == "adapter.rope.bands":
            return FourierRope(self._config.head_dim, like.dtype, self._device).bands
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        scale = 0.1 if like.ndim == 1 else like.shape[-1] ** -0.5
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=self._device).mul_(scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)


def inputs(model: DiT, tokens: Tokens) -> tuple[Any, ...]:
    """Arguments of `model.velocity`: noise as in the first step, random text, the coordinates of such a clip.

    Of `model` only what its `condition` reads is needed; they lie on its device.
    """
    generator = torch.Generator().manual_seed(0)
    config, like = model.config, model.adapter.text_embedder.weight

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(like)

    video, audio = normal(tokens.video, config.video_in_channels), normal(tokens.audio, config.audio_in_channels)
    with torch.no_grad():
        condition = model.condition(
            normal(tokens.text, config.text_in_channels), coordinates(tokens.grid, tokens.text).to(like.device)
        )
    return video, audio, condition, tokens.frames
