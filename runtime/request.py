"""What goes into the engine and what comes out. Requests are validated here, once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from horsepower.runtime.presets import PIPELINES, SPEECH_LANGUAGES

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_CHARACTERS = 100_000
MAX_SECONDS = 60.0
MIN_SECONDS = 0.2
MAX_STEPS = 1000
MIN_SIDE, MAX_SIDE = 32, 8192


class Cancelled(Exception):  # noqa: N818  (an answer, not an error)
    """The request was cancelled by its caller."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One clip to make; every field is filled by the caller. Raises ValueError that names the field."""

    prompt: str  # 150 to 200 English words work best: person, face, voice, camera, then sound
    resolution: str | tuple[int, int] = "256p"  # a pipeline, or pixels (width, height)
    duration: float = 5  # seconds
    num_inference_steps: int | None = None  # of the base stage; None: 8 distilled, 32 base
    seed: int = 42
    image: "str | os.PathLike[str] | Image | None" = None  # first frame
    audio: str | os.PathLike[str] | None = None  # sound to follow; the clip is no longer than it
    keep_audio: bool = False  # distilled models regenerate given sound unless told to keep it
    speech_text: str | None = None  # a line to be spoken
    speech_language: str | None = None  # of speech_text: en zh yue ja ko de fr
    negative_prompt: str | None = None  # base model only; None: a default list of unwanted traits
    guidance: float | None = None  # base model only, while noise is high (2.0 after that); None: 5.0
    super_resolution_guidance: float | None = None  # None: one forward a step; 3.5 is usual otherwise
    sampler: Literal["unipc", "sde"] | None = None  # base model only; None: unipc

    def __post_init__(self) -> None:
        check_text("prompt", self.prompt)
        self._check_resolution()
        _check_number("duration", self.duration, MIN_SECONDS, MAX_SECONDS, "seconds")
        if self.num_inference_steps is not None:
            _check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        _check_integer("seed", self.seed, 0, 2**63 - 1)
        self._check_speech()
        if self.negative_prompt is not None:
            check_text("negative_prompt", self.negative_prompt)
        for name in ("guidance", "super_resolution_guidance"):
            if (value := getattr(self, name)) is not None:
                _check_number(name, value, 0.0, 100.0, "")
        if self.sampler not in (None, "unipc", "sde"):
            raise ValueError(f"sampler: got {_short(self.sampler)}, allowed: unipc, sde")
        self._check_media()

    def _check_resolution(self) -> None:
        allowed = f"{', '.join(PIPELINES)}, or (width, height) of {MIN_SIDE} to {MAX_SIDE} pixels each"
        size = self.resolution
        if isinstance(size, str):
            fits = size in PIPELINES
        else:
            fits = (
                isinstance(size, tuple)
                and len(size) == 2
                and all(_is_integer(side) and MIN_SIDE <= side <= MAX_SIDE for side in size)
            )
        if not fits:
            raise ValueError(f"resolution: got {_short(size)}, allowed: {allowed}")

    def _check_media(self) -> None:
        if not isinstance(self.image, str | os.PathLike | None):
            from PIL.Image import Image

            if not isinstance(self.image, Image):
                raise ValueError(f"image: got {_short(self.image)}, allowed: a path, a PIL image or None")
        if not isinstance(self.audio, str | os.PathLike | None):
            raise ValueError(f"audio: got {_short(self.audio)}, allowed: a path or None")
        if not isinstance(self.keep_audio, bool) or (self.keep_audio and self.audio is None):
            raise ValueError(f"keep_audio: got {_short(self.keep_audio)}, allowed: False, or True with audio")

    def _check_speech(self) -> None:
        languages = ", ".join(SPEECH_LANGUAGES)
        if (self.speech_text is None) != (self.speech_language is None):
            missing = "speech_text" if self.speech_text is None else "speech_language"
            raise ValueError(f"{missing}: got None, allowed: both of speech_text and speech_language, or neither")
        if self.speech_text is not None:
            check_text("speech_text", self.speech_text)
            if not isinstance(self.speech_language, str) or self.speech_language not in SPEECH_LANGUAGES:
                raise ValueError(f"speech_language: got {_short(self.speech_language)}, allowed: {languages}")
            if "Dialogue:" in self.prompt:
                raise ValueError("speech_text: got a line, but prompt has a Dialogue: part, allowed: one of the two")


def check_text(name: str, text: object) -> None:
    """Raise ValueError unless `text` is a string that a text encoder can take."""
    allowed = f"text of 1 to {MAX_CHARACTERS} characters without NUL or lone surrogates"
    if not isinstance(text, str):
        raise ValueError(f"{name}: got {type(text).__name__}, allowed: {allowed}")
    if not text.strip():
        raise ValueError(f"{name}: got an empty text, allowed: {allowed}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name}: got {len(text)} characters, allowed: {allowed}")
    for i, character in enumerate(text):
        if character == "\0" or "\ud800" <= character <= "\udfff":
            raise ValueError(f"{name}: got {character!a} at position {i}, allowed: {allowed}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not (_is_integer(value) and low <= value <= high):  # type: ignore[operator]
        raise ValueError(f"{name}: got {_short(value)}, allowed: an integer from {low} to {high}")


def _check_number(name: str, value: object, low: float, high: float, unit: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and low <= value <= high):  # type: ignore[operator]
        raise ValueError(f"{name}: got {_short(value)}, allowed: {low:g} to {high:g} {unit}".rstrip())


def _short(value: object) -> str:
    """A value as a message can hold it."""
    try:
        text = repr(value)
    except ValueError:  # an integer with thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Progress:
    """How far a request has come; filled by the engine."""

    stage: str  # text, conditioning, base, super-resolution, video, audio
    step: int  # finished steps of the stage
    steps: int


@dataclass(frozen=True)
class Timings:
    """Where the time went; filled by the engine."""

    stages: Mapping[str, float]  # seconds of each stage, in order; a stage includes loading what it is first to use
    peak_memory: int  # bytes: of the GPU's allocator during the request, on a CPU of the process so far

    @property
    def total(self) -> float:
        return sum(self.stages.values())


@dataclass(frozen=True)
class Result:
    """A finished clip; filled by the engine. Tensors are on the CPU and the caller's own."""

    video: Tensor  # uint8 [F, H, W, 3]
    audio: Tensor  # float32 [S, 2]
    fps: int
    sample_rate: int
    seed: int
    timings: Timings
    notes: tuple[str, ...] = ()  # what was done otherwise than asked: a cut prompt, a rounded size

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, after rounding."""
        return self.video.shape[2], self.video.shape[1]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an mp4 (H.264 and AAC), whole or not at all. Raises ValueError if `path` cannot be written."""
        from horsepower.runtime.media import write_mp4

        write_mp4(path, self.video, self.audio, self.fps, self.sample_rate)
        return Path(path)

    def __eq__(self, other: Any) -> bool:
        """Equal clips, bit by bit, whatever they took."""
        if not isinstance(other, Result):
            return NotImplemented
        return torch.equal(self.video, other.video) and torch.equal(self.audio, other.audio)

    __hash__ = None  # type: ignore[assignment]
