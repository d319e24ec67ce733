"""Small DiTs with random weights, and how they are compiled."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from horsepower.runtime.compiled import Compiled, compile
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit_config import DiTConfig

TINY = DiTConfig(
    num_layers=3, hidden_size=64, head_dim=16, num_query_groups=2, video_in_channels=8, audio_in_channels=4,
    text_in_channels=12, mm_layers=(0, 2), gelu7_layers=(0,),
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "windowed": {"local_attn_layers": (0, 1), "frame_receptive_field": 1},
    "post_norm": {"post_norm_layers": (0, 1, 2)},
    "per_head": {"gating": "per_head"},
    "no_gate": {"gating": "none"},
    "bfloat16_residual": {"params_dtype": torch.bfloat16},
}
DYNAMIC = ({0: torch.export.Dim.DYNAMIC},) * 4 + (torch.export.Dim.DYNAMIC,)


def random_model(config: DiTConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> DiT:
    """Weights that keep the size of what passes through them."""
    model = DiT(config, dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def random_inputs(config: DiTConfig, frames: int, tokens: int, audio: int, text: int) -> tuple[Tensor, ...]:
    """Video of `frames` frames of `tokens`, audio, text, coordinates."""
    generator = torch.Generator().manual_seed(1)
    channels = (config.video_in_channels, config.audio_in_channels, config.text_in_channels)
    counts = (frames * tokens, audio, text)
    parts = [torch.randn(n, c, generator=generator) for n, c in zip(counts, channels, strict=True)]
    coords = torch.rand(sum(counts), 9, generator=generator) * 4 + 2
    return (*parts, coords)


def variant(name: str) -> DiTConfig:
    return replace(TINY, **VARIANTS[name])


def compiled(model: DiT, expect: dict[str, int] | None = None) -> Compiled:
    """With token counts and frames dynamic."""
    return compile(model, (*random_inputs(model.config, 3, 2, 5, 4), 3), dynamic_shapes=DYNAMIC, expect=expect)
