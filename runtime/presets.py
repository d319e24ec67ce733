"""The models that exist, the pipelines made of them, and their sizes."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from horsepower.runtime.models.dit_config import DiTConfig

ModelName = Literal["base", "distill", "540p_sr", "1080p_sr"]

MODELS: dict[ModelName, DiTConfig] = {
    "base": DiTConfig(),
    "distill": DiTConfig(),
    "540p_sr": DiTConfig(),
    # Every fourth layer attends to the whole clip; the experts at the end do not.
    "1080p_sr": DiTConfig(local_attn_layers=tuple(n for n in range(40) if n % 4 != 3 or n >= 35)),
}

# The same 40 layers in three kinds, 380 times smaller.
FOAL = DiTConfig(hidden_size=256, head_dim=64, num_query_groups=2, text_in_channels=64)
FOAL_MODELS: dict[ModelName, DiTConfig] = {
    name: replace(FOAL, local_attn_layers=config.local_attn_layers) for name, config in MODELS.items()
}

SPEECH_LANGUAGES = {
    "en": "English",
    "zh": "Mandarin",
    "yue": "Cantonese",
    "ja": "Japanese",
    "ko": "Korean",
    "de": "German",
    "fr": "French",
}


@dataclass(frozen=True)
class Pipeline:
    """A base stage at about 448 x 256 pixels and, for larger pictures, a super-resolution model."""

    width: int
    height: int
    super_resolution: ModelName | None


PIPELINES = {
    "256p": Pipeline(448, 256, None),
    "540p": Pipeline(896, 512, "540p_sr"),
    "1080p": Pipeline(1920, 1088, "1080p_sr"),
}


@dataclass(frozen=True)
class Sizes:
    """Pixel sizes (width, height) of a clip's stages, multiples of 32."""

    base: tuple[int, int]
    final: tuple[int, int]
    super_resolution: ModelName | None


def sizes(resolution: str | tuple[int, int]) -> Sizes:
    """The stages of a pipeline, or of the pipeline nearest to (width, height) in area, rounded down to 32 pixels."""
    if isinstance(resolution, str):
        pipeline = PIPELINES[resolution]
        width, height = pipeline.width, pipeline.height
    else:
        width, height = resolution
        area = width * height
        pipeline = min(PIPELINES.values(), key=lambda p: abs(math.log(area / (p.width * p.height))))
    final = (width // 32 * 32, height // 32 * 32)
    if pipeline.super_resolution is None:
        return Sizes(final, final, None)
    smallest = PIPELINES["256p"]
    scale = math.sqrt(smallest.width * smallest.height / (width * height))
    base = (max(32, round(width * scale / 32) * 32), max(32, round(height * scale / 32) * 32))
    return Sizes(base, final, pipeline.super_resolution)
