"""Latents as tokens and back, and where in time and space each token lies."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CoordsStyle = Literal["v1", "v2"]
FPS = 25
PIXELS = 16  # a latent pixel's height and width in pixels
PATCH = 2  # a token covers 2 x 2 latent pixels of one latent frame
AUDIO_CHANNELS = 64
VIDEO_CHANNELS = 48


@dataclass(frozen=True)
class Grid:
    """The size of a clip in latents: T frames of height x width, and A rows of audio."""

    frames: int
    height: int
    width: int
    audio: int

    @classmethod
    def of(cls, width: int, height: int, audio: int) -> "Grid":
        """For a clip of `width` x `height` pixels with `audio` latents, one a video frame (25 a second)."""
        rows, columns = height // PIXELS // PATCH, width // PIXELS // PATCH
        return cls((audio - 1) // 4 + 1, rows * PATCH, columns * PATCH, audio)

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height of the decoded picture."""
        return self.width * PIXELS, self.height * PIXELS

    @property
    def rows(self) -> int:
        return self.height // PATCH

    @property
    def columns(self) -> int:
        return self.width // PATCH

    @property
    def video(self) -> int:
        """Video tokens."""
        return self.frames * self.rows * self.columns

    @property
    def video_shape(self) -> tuple[int, int, int, int, int]:
        return 1, VIDEO_CHANNELS, self.frames, self.height, self.width

    @property
    def audio_shape(self) -> tuple[int, int, int]:
        return 1, self.audio, AUDIO_CHANNELS


def patchify(latent: Tensor) -> Tensor:
    """[1, c, T, h, w] -> [T * h/2 * w/2, 4 c], channels in the order (c, dy, dx) of the model's input."""
    _, c, T, h, w = latent.shape
    patches = latent[0].reshape(c, T, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(1, 2, 4, 0, 3, 5).reshape(-1, c * PATCH * PATCH)


def unpatchify(tokens: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    """[T * rows * columns, 4 c], channels in the order (dy, dx, c) of the model's output -> [1, c, T, h, w]."""
    c = tokens.shape[-1] // (PATCH * PATCH)
    patches = tokens.reshape(frames, rows, columns, PATCH, PATCH, c)
    return patches.permute(5, 0, 1, 3, 2, 4).reshape(1, c, frames, rows * PATCH, columns * PATCH)


def coordinates(grid: Grid, text: int, style: CoordsStyle = "v2") -> Tensor:
    """Position, size and reference size in (t, h, w) of every token: float32 [V + A + text, 9] on the CPU.

    The styles differ in text: v1 spreads it over the first latent frame, v2 puts all of it at time 0. MagiHuman's base
    stage is trained with v2, its super-resolution with v1. What is 1 long but has another reference size (one text
    token in v1, say) has no place: ValueError.
    """
    if style == "v1" and 1 in (text, grid.audio) and (text == 1 or grid.frames > 1):
        raise ValueError(f"text, audio: got {text} and {grid.audio} tokens, allowed: at least 2 of each in style v1")
    size = (grid.frames, grid.rows, grid.columns)
    audio_span = grid.frames if style == "v1" else (grid.audio - 1) // 4 + 1
    return torch.cat(
        [
            _rows(torch.cartesian_prod(*(torch.arange(n) for n in size)), size, size),
            _rows(_line(0, grid.audio), (grid.audio, 1, 1), (audio_span, 1, 1)),
            _rows(_line(0 if style == "v1" else -text, text), (text, 1, 1), (2 if style == "v1" else 1, 1, 1)),
        ]
    )


def _line(start: int, count: int) -> Tensor:
    positions = torch.zeros(count, 3, dtype=torch.int64)
    positions[:, 0] = torch.arange(start, start + count)
    return positions


def _rows(positions: Tensor, size: tuple[int, int, int], reference: tuple[int, int, int]) -> Tensor:
    constant = torch.tensor([*size, *reference], dtype=torch.float32)
    return torch.cat((positions.float(), constant.expand(len(positions), -1)), dim=1)
