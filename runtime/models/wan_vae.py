"""The Wan2.2 video VAE through diffusers' AutoencoderKLWan: 48 channels, stride (4, 16, 16), first frame alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

# Published statistics of the Wan2.2 TI2V-5B latents, one value a channel; the Turbo decoder uses the same.
LATENT_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
LATENT_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
CHANNELS = len(LATENT_MEAN)
STRIDE = (4, 16, 16)
Half = Literal["encoder", "decoder"]
ENCODER, DECODER = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")  # modules of the halves

# Released key -> diffusers key, applied in this order; each rule takes a whole path component. (spec: vae.md §2)
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
        (r"\.middle\.0\.", ".mid_block.resnets.0."),
        (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (r"\.middle\.2\.", ".mid_block.resnets.1."),
        (r"\.head\.0\.", ".norm_out."),
        (r"\.head\.2\.", ".conv_out."),
        (r"\.downsamples\.(\d+)\.downsamples\.\d+\.(resample\.1|time_conv)\.", r".down_blocks.\1.downsampler.\2."),
        (r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
        (r"\.upsamples\.(\d+)\.upsamples\.\d+\.(resample\.1|time_conv)\.", r".up_blocks.\1.upsampler.\2."),
        (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
        (r"\.residual\.0\.", ".norm1."),
        (r"\.residual\.2\.", ".conv1."),
        (r"\.residual\.3\.", ".norm2."),
        (r"\.residual\.6\.", ".conv2."),
        (r"\.shortcut\.", ".conv_shortcut."),
    )
)


def rename(key: str) -> str:
    """The key in diffusers' AutoencoderKLWan of the key `key` of the released Wan2.2_VAE.pth (no value changes)."""
    for pattern, replacement in _RENAMES:
        key = pattern.sub(replacement, key)
    return key


def build(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    encoder_width: int = 160,
    decoder_width: int = 256,
) -> AutoencoderKLWan:
    """The Wan2.2 VAE in evaluation mode; the default widths are the release's (704.7 M parameters).

    On `device="meta"` nothing is allocated and the random generator is not touched; fill it with
    `load_state_dict(..., assign=True)`.
    """
    from diffusers import AutoencoderKLWan

    with torch.device(device):
        vae = AutoencoderKLWan(
            base_dim=encoder_width,
            decoder_base_dim=decoder_width,
            z_dim=CHANNELS,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=2,
            attn_scales=[],
            temperal_downsample=[False, True, True],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_temporal=STRIDE[0],
            scale_factor_spatial=STRIDE[1],
            latents_mean=list(LATENT_MEAN),
            latents_std=list(LATENT_STD),
        )
    nn.Module.to(vae, dtype)  # diffusers' own `to` warns about float32 modules that this model does not have
    return vae.eval().requires_grad_(False)


def halved(vae: AutoencoderKLWan, half: Half) -> AutoencoderKLWan:
    """The same VAE, changed in place, without its other half's modules."""
    for name in ENCODER if half == "decoder" else DECODER:
        setattr(vae, name, nn.Identity())
    return vae


def encode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], [1, 3, F, H, W], to normalised latents float32 [1, 48, (F-1)/4 + 1, H/16, W/16].

    The posterior's mean, never a sample. Everything, the statistics and 1/std too, is computed in the VAE's dtype:
    the DiT was conditioned on latents with that rounding (bfloat16).
    Raises ValueError if F is not 4n+1 or a side is not a multiple of 16; diffusers would drop the rest in silence.
    """
    _check_pixels(pixels)
    mean, inv_std = _statistics(vae)
    mu: Tensor = vae.encode(pixels.to(mean.device, mean.dtype)).latent_dist.mode()
    return ((mu - mean) * inv_std).float()


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Normalised latents [1, 48, T, h, w] to pixels clamped to [-1, 1], [1, 3, 4T-3, 16h, 16w], in the VAE's dtype."""
    if latents.ndim != 5 or latents.shape[1] != CHANNELS or 0 in latents.shape:
        raise ValueError(f"latents: got shape {list(latents.shape)}, allowed: [1, {CHANNELS}, T, h, w]")
    mean, inv_std = _statistics(vae)
    pixels: Tensor = vae.decode(latents.to(mean.device, mean.dtype) / inv_std + mean).sample
    return pixels


def _statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Mean and 1/std, [48, 1, 1, 1] each, on the VAE's device and rounded to its dtype *before* the division."""
    weight = next(vae.parameters())
    mean, std = (weight.new_tensor(v) for v in (LATENT_MEAN, LATENT_STD))
    return mean.view(-1, 1, 1, 1), (1 / std).view(-1, 1, 1, 1)


def _check_pixels(pixels: Tensor) -> None:
    if pixels.ndim != 5 or pixels.shape[1] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels: got shape {list(pixels.shape)}, allowed: [1, 3, F, H, W]")
    F, H, W = pixels.shape[2:]
    if F % STRIDE[0] != 1:
        raise ValueError(f"pixels: got {F} frames, allowed: 4n + 1")
    if H % STRIDE[1] or W % STRIDE[2]:
        raise ValueError(f"pixels: got height {H} and width {W}, allowed: multiples of 16")
