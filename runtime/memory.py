"""What a clip needs, known before anything is allocated."""

import torch

from horsepower.runtime.devices import free_bytes
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit_config import DiTConfig
from horsepower.runtime.models.text import MAX_TOKENS
from horsepower.runtime.models.turbo_vae import TurboConfig
from horsepower.runtime.tokens import Grid


def activation_bytes(config: DiTConfig, grid: Grid, text: int = MAX_TOKENS) -> int:
    """Peak of the eager DiT's activations, reached inside an MLP's float32 activation function."""
    # Residual, norm output, up-projection (with its bfloat16 twin) and the temporaries of swiglu7 or gelu7. Experts
    # hold their parts of the projection once more while they are joined.
    widest = max(32 * config.swiglu7_width, 18 * config.gelu7_width)
    if config.mm_layers:
        widest = max(36 * config.swiglu7_width, widest)
    return (grid.video + grid.audio + text) * (6 * config.hidden_size + widest)


def weight_bytes(config: DiTConfig, dtype: torch.dtype) -> int:
    """A DiT's parameters."""
    return sum(p.numel() * p.itemsize for p in DiT(config, dtype, "meta").parameters())


def turbo_bytes(config: TurboConfig, grid: Grid, dtype: torch.dtype) -> int:
    """Peak of the Turbo decoder's activations on its longest chunk, where the width is halved before full size."""
    chunk = config.step_size + 2 if grid.frames > config.first_chunk_size else config.first_chunk_size
    values = config.decoder_block_out_channels[1] * config.temporal_ratio * chunk * (8 * grid.height) * (8 * grid.width)
    return values * 11 * dtype.itemsize // 2  # five and a half copies, measured


def wan_bytes(grid: Grid, dtype: torch.dtype) -> int:
    """Peak of Wan's decoder: one latent frame's activations and caches (measured), and the clip in its own dtype."""
    frame = int(1.4 * 2**20) * grid.height * grid.width
    return (frame + 2 * picture_bytes(grid)) * dtype.itemsize


def picture_bytes(grid: Grid) -> int:
    """The finished frames, uint8."""
    width, height = grid.pixels
    return (4 * grid.frames - 3) * width * height * 3


def check_fits(needed: int, grid: Grid, device: torch.device) -> None:
    """Raise ValueError if a clip needs more memory than is free."""
    free = free_bytes(device)
    if needed > free:
        width, height = grid.pixels
        raise ValueError(
            f"resolution, duration: got {width}x{height} with {grid.frames} latent frames, which needs about "
            f"{needed / 2**30:.1f} GiB, allowed: what fits {free / 2**30:.1f} GiB free on {device}; "
            f"{(needed - free) / 2**30:.1f} GiB are missing"
        )


def check_loads(model: str, needed: int, device: torch.device) -> None:
    """Raise ValueError if a model's weights need more memory than is free."""
    if needed > (free := free_bytes(device)):
        raise ValueError(
            f"model {model}: got {needed / 2**30:.1f} GiB of weights, allowed: what fits {free / 2**30:.1f} GiB free "
            f"on {device}; {(needed - free) / 2**30:.1f} GiB are missing"
        )
