"""What the parts of an engine take, in bytes, known before anything is allocated.

Weights are exact: those of modules on the meta device. Activations are bounds: the storages that live at one time were
counted operator by operator, at small sizes and on the meta device at released ones, and the law fitted from above; the
tests count again. Scratch memory inside an operator of torch (a convolution's workspace) is not seen by that.
"""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from horsepower.graph.plan import Plan
from horsepower.runtime.devices import free_bytes
from horsepower.runtime.fused import CONDITIONER, velocity_sizes
from horsepower.runtime.models import audio_vae, wan_vae
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit_config import DiTConfig
from horsepower.runtime.models.text import MAX_TOKENS
from horsepower.runtime.models.turbo_vae import TurboConfig, TurboDecoder
from horsepower.runtime.sampling import SamplerName
from horsepower.runtime.tokens import Grid

if TYPE_CHECKING:
    from transformers import T5GemmaModuleConfig

__all__ = ["free_bytes"]

LATENT_COPIES: Mapping[SamplerName, int] = {"distilled": 7, "sde": 8, "unipc": 12}  # alive in a sampler's step, counted


class PartBytes(NamedTuple):
    """Of a text encoder or a codec."""

    weights: int
    activations: int  # the most at one time, beside the weights


class DiTBytes(NamedTuple):
    """Of a DiT for one stage of a clip."""

    weights: int  # as they lie when they are loaded
    load: int  # the most while they are loaded, with those that are finished
    arena: int  # that it keeps after a step, with the buffers of its CUDA graphs
    beside: int  # that a step takes beside the arena


def module_bytes(module: nn.Module) -> int:
    """Of a module's parameters and buffers, each counted once; it may be on the meta device."""
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


@cache
def weight_bytes(config: DiTConfig, dtype: torch.dtype) -> int:
    """A DiT's parameters."""
    return sum(p.nbytes for p in DiT(config, dtype, "meta").parameters())


def activation_bytes(config: DiTConfig, grid: Grid, text: int = MAX_TOKENS) -> int:
    """Peak of the eager DiT's activations, reached inside an MLP's float32 activation function."""
    # Residual, norm output, up-projection (with its bfloat16 twin) and the temporaries of swiglu7 or gelu7. Experts
    # hold their parts of the projection once more while they are joined.
    widest = max(32 * config.swiglu7_width, 18 * config.gelu7_width)
    if config.mm_layers:
        widest = max(36 * config.swiglu7_width, widest)
    return (grid.video + grid.audio + text) * (11 * config.hidden_size + widest)


def eager_bytes(config: DiTConfig, dtype: torch.dtype, grid: Grid) -> DiTBytes:
    """A DiT as it is written."""
    weights = weight_bytes(config, dtype)
    return DiTBytes(weights, weights, 0, activation_bytes(config, grid))


def planned_bytes(model: DiT, plan: Plan, grid: Grid, passes: int) -> DiTBytes:
    """A DiT as its plan states it; passes: of a step, each with a text of its own and so with a CUDA graph.

    On a CPU operators of torch have scratch memory beside the plan's: there the bound of eager activations holds.
    """
    conditioner = sum(module_bytes(model.get_submodule(name)) for name in CONDITIONER)
    weights = (plan.weight_bytes + conditioner, plan.load_bytes + conditioner)
    config, layout = model.config, plan.at(velocity_sizes((grid.video, grid.audio, MAX_TOKENS), grid.frames))
    if plan.target == "cpu":
        return DiTBytes(*weights, layout.arena, max(0, activation_bytes(config, grid) - layout.arena))
    copied = 3 * latent_bytes(grid) + condition_bytes(config, grid)  # a graph's own inputs, and its results twice
    return DiTBytes(*weights, layout.arena + passes * copied, layout.peak - layout.arena)


def latent_bytes(grid: Grid) -> int:
    """Video and audio of a clip between steps, float32."""
    return 4 * (torch.Size(grid.video_shape).numel() + torch.Size(grid.audio_shape).numel())


def condition_bytes(config: DiTConfig, grid: Grid) -> int:
    """What stays the same over a stage: the embedded text, and sines and cosines for each token, in float32."""
    tokens = grid.video + grid.audio + MAX_TOKENS
    return 4 * (MAX_TOKENS * config.hidden_size + tokens * 6 * (config.head_dim // 8))


def stage_bytes(config: DiTConfig, grid: Grid, sampler: SamplerName, passes: int) -> int:
    """What a stage takes beside its model: latents in the sampler's hands, and a condition for each pass of a step."""
    return LATENT_COPIES[sampler] * latent_bytes(grid) + passes * condition_bytes(config, grid)


def t5gemma_bytes(config: "T5GemmaModuleConfig", tokens: int) -> int:
    """Peak of T5Gemma's encoder in bfloat16: in the softmax of all heads' scores, or inside the MLP of a short text."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    # scores in bfloat16, in float32, and their softmax; q, k, v with the repeated k, v; the residual, normed
    attention = 10 * heads * tokens + 10 * heads * config.head_dim + 6 * hidden
    mlp = 6 * config.intermediate_size + 12 * hidden
    peak: int = tokens * (max(attention, mlp) + 4 * tokens)  # two masks in bfloat16
    return peak


def hashed_word_bytes(width: int) -> PartBytes:
    """The stand-in for a text encoder: its tables, and its attention's scores in float32 twice."""
    weights = (4096 + MAX_TOKENS + 12 * width) * width
    return PartBytes(4 * weights, MAX_TOKENS * (8 * MAX_TOKENS + 24 * width))


@cache
def turbo_weights(config: TurboConfig, dtype: torch.dtype) -> int:
    """Of the Turbo decoder."""
    with torch.device("meta"):
        return module_bytes(TurboDecoder(config).to(dtype))


def turbo_bytes(config: TurboConfig, grid: Grid, dtype: torch.dtype) -> int:
    """Peak of the Turbo decoder's activations on its longest chunk, where the width is halved before full size."""
    chunk = config.step_size + 2 if grid.frames > config.first_chunk_size else config.first_chunk_size
    pixels = config.temporal_ratio * chunk * (8 * grid.height) * (8 * grid.width)
    # 5.7 copies, and the norm's sums in float32
    return pixels * (config.decoder_block_out_channels[1] * 57 * dtype.itemsize // 10 + 8)


@cache
def wan_weights(half: wan_vae.Half, widths: tuple[int, int], dtype: torch.dtype) -> int:
    """Of one half of Wan's VAE; widths: of the encoder's first layer and the decoder's last."""
    vae = wan_vae.build("meta", dtype, encoder_width=widths[0], decoder_width=widths[1])
    return module_bytes(wan_vae.halved(vae, half))


def wan_encode_bytes(width: int, size: tuple[int, int], dtype: torch.dtype) -> int:
    """Peak of Wan's encoder on one picture of (width, height) pixels; width: of its first layer."""
    return int(1.06 * (3 * width + 16)) * size[0] * size[1] * dtype.itemsize


def wan_decode_bytes(width: int, grid: Grid, dtype: torch.dtype) -> int:
    """Peak of Wan's decoder: one latent frame's activations and caches, and the clip; width: of its last layer."""
    return (5735 * width * grid.height * grid.width + 2 * picture_bytes(grid)) * dtype.itemsize


def audio_decode_bytes(width: int, latents: int) -> int:
    """Peak of Stable Audio's decoder, float32; width: of its last layer."""
    return (36_864 * width + 256) * latents + 4096


def audio_encode_bytes(width: int, latents: int) -> int:
    """Peak of Stable Audio's encoder, float32, on one window of the sound; width: of its first layer."""
    wave = 8 * 2048
    return (40_960 * width + wave) * min(latents, audio_vae.WINDOW) + 2 * wave * latents


def audio_bytes(config: Mapping[str, Any], latents: int, given: bool) -> PartBytes:
    """Stable Audio's autoencoder; config: as `audio_vae.build` takes it; given: whether it encodes, too."""
    decode = audio_decode_bytes(config["decoder_width"], latents)
    return PartBytes(
        _audio_weights(**config), max(decode, audio_encode_bytes(config["encoder_width"], latents) if given else 0)
    )


@cache
def _audio_weights(**config: Any) -> int:
    return module_bytes(audio_vae.without_weight_norm(audio_vae.build("meta", **config)))


def picture_bytes(grid: Grid) -> int:
    """The finished frames, uint8."""
    width, height = grid.pixels
    return (4 * grid.frames - 3) * width * height * 3


def check_fits(needed: int, budget: int, grid: Grid, phase: str, device: torch.device) -> None:
    """Raise ValueError if a phase of a clip needs more than an engine has."""
    if needed > budget:
        width, height = grid.pixels
        raise ValueError(
            f"resolution, duration: got {width}x{height} with {grid.frames} latent frames, which needs about "
            f"{needed / 2**30:.1f} GiB in {phase}, allowed: what fits {budget / 2**30:.1f} GiB of {device}; "
            f"{(needed - budget) / 2**30:.1f} GiB are missing"
        )


def check_loads(part: str, needed: int, budget: int, device: torch.device) -> None:
    """Raise ValueError if a part's weights need more than an engine has."""
    if needed > budget:
        raise ValueError(
            f"{part}: got {needed / 2**30:.1f} GiB of weights, allowed: what fits {budget / 2**30:.1f} GiB of "
            f"{device}; {(needed - budget) / 2**30:.1f} GiB are missing"
        )
