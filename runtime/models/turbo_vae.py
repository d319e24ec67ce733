"""The Turbo VAED: a small non-causal decoder for Wan2.2 video latents, run over a sliding window in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horsepower.runtime.models.wan_vae import CHANNELS, LATENT_MEAN, LATENT_STD

# What the released configuration says and this decoder takes for granted.
_FIXED = {
    "decoder_causal": False,
    "latent_channels": CHANNELS,
    "out_channels": 3,
    "patch_size_t": 1,
    "scaling_factor": 1,
    "use_unpatchify": True,
}


@dataclass(frozen=True)
class TurboConfig:
    """The decoder's shape in the released JSON's names; the defaults are the release. Lists begin at the output."""

    decoder_block_out_channels: tuple[int, ...] = (64, 128, 256, 512)
    decoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3)  # the last is the middle block
    decoder_spatio_temporal_scaling: tuple[bool, ...] = (False, True, True, True)
    decoder_spatio_only: tuple[bool, ...] = (False, True, False, False)
    patch_size: int = 2
    resnet_norm_eps: float = 1e-6  # of the norm in a resnet's shortcut; the other norms have 1e-8
    first_chunk_size: int = 7  # latent frames
    step_size: int = 7  # latent frames

    def __post_init__(self) -> None:
        blocks = max(len(self.decoder_block_out_channels), 1)
        for field in fields(self):
            value, default = getattr(self, field.name), getattr(type(self), field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            kind = type(default[0] if isinstance(default, tuple) else default)
            positive = kind is bool or all(type(n) is kind and n > 0 for n in numbers)
            if type(value) is not type(default) or not positive:
                raise ValueError(f"{field.name}: got {value!r}, allowed: values like {default!r}")
            if isinstance(value, tuple) and len(value) != (
                length := blocks + (field.name == "decoder_layers_per_block")
            ):
                raise ValueError(f"{field.name}: got {len(value)} values, allowed: {length} for {blocks} blocks")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TurboConfig:
        """From the released JSON (TurboV3-Wan22-TinyShallow_7_7.json); keys about training are ignored.

        Raises ValueError, naming the field, for a missing one and for variants that the release does not use.
        """
        for name, allowed in _FIXED.items():
            if config.get(name, allowed) != allowed:
                raise ValueError(f"{name}: got {config[name]!r}, allowed: {allowed!r}")
        if any(config.get("decoder_is_dw_conv", ())):
            raise ValueError(f"decoder_is_dw_conv: got {config['decoder_is_dw_conv']!r}, allowed: all false")
        values: dict[str, Any] = {}
        for name in (field.name for field in fields(cls)):
            if name not in config:
                raise ValueError(f"{name}: missing in the Turbo VAED configuration")
            values[name] = tuple(config[name]) if isinstance(config[name], list) else config[name]
        return cls(**values)

    @property
    def upsampling(self) -> tuple[bool | None, ...]:
        """Per block from the output: True in time and space, False in space only, None not at all."""
        scaling = zip(self.decoder_spatio_temporal_scaling, self.decoder_spatio_only, strict=True)
        return tuple(not spatial if scale else None for scale, spatial in scaling)

    @property
    def temporal_ratio(self) -> int:
        """Pixel frames per latent frame after the first (4)."""
        return 1 << self.upsampling.count(True)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / rms over the channels of [B, C, T, H, W], without weights; float32 inside, x's dtype outside."""
    # vector_norm sums bfloat16 in float32 without making a float32 copy of x, which is gigabytes at 1080p.
    mean_square = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).square() / x.shape[1]
    return (x * torch.rsqrt(mean_square + eps)).to(x.dtype)


class Conv3d(nn.Module):
    """Convolution over [B, C, T, H, W] that keeps T, H, W: end frames repeated in time, zeros in space."""

    def __init__(self, width_in: int, width_out: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width_in, width_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.repeats = kernel[0] // 2

    def forward(self, x: Tensor) -> Tensor:
        if self.repeats:
            x = torch.cat([x[:, :, :1]] * self.repeats + [x] + [x[:, :, -1:]] * self.repeats, dim=2)
        return self.conv(x)  # type: ignore[no-any-return]


class Resnet(nn.Module):
    """x + conv(silu(norm(conv(act(norm(x)))))); the shortcut is normed and projected where the width changes."""

    def __init__(self, width_in: int, width_out: int, act: Callable[[Tensor], Tensor], shortcut_eps: float) -> None:
        super().__init__()
        self.conv1 = Conv3d(width_in, width_out, (3, 3, 3))
        self.conv2 = Conv3d(width_out, width_out, (3, 3, 3))
        self.conv_shortcut = Conv3d(width_in, width_out, (1, 1, 1)) if width_in != width_out else None
        self.act = act
        self.shortcut_eps = shortcut_eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv1(self.act(rms_norm(x, 1e-8)))
        y = self.conv2(F.silu(rms_norm(y, 1e-8)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(rms_norm(x, self.shortcut_eps))
        return x + y


class Upsampler(nn.Module):
    """Twice the height and width and, with `temporal`, twice the frames (one less in a clip's first chunk)."""

    def __init__(self, width: int, temporal: bool) -> None:
        super().__init__()
        self.time_conv = Conv3d(width, 2 * width, (3, 1, 1)) if temporal else None
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor, first_chunk: bool) -> Tensor:
        B, C = x.shape[:2]
        if self.time_conv is not None:
            halves = self.time_conv(x).unflatten(1, (2, C))
            x = halves.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # the halves are alternate frames
            x = x[:, :, 1:] if first_chunk else x
        frames: Tensor = self.resample(x.transpose(1, 2).flatten(0, 1))
        return frames.view(B, -1, *frames.shape[1:]).transpose(1, 2)


class Block(nn.Module):
    """A resnet to the new width, an upsampler, resnets: what is not needed is left out (see TurboConfig.upsampling)."""

    def __init__(self, width_in: int, width: int, layers: int, temporal: bool | None, eps: float) -> None:
        super().__init__()
        self.conv_in = Resnet(width_in, width, F.silu, eps) if width_in != width else None
        self.upsamplers = nn.ModuleList([] if temporal is None else [Upsampler(width, temporal)])
        act = F.silu if temporal is None else F.relu
        self.resnets = nn.ModuleList(Resnet(width, width, act, eps) for _ in range(layers))

    def forward(self, x: Tensor, first_chunk: bool) -> Tensor:
        if self.conv_in is not None:
            x = self.conv_in(x)
        for upsampler in self.upsamplers:
            x = upsampler(x, first_chunk)
        for resnet in self.resnets:
            x = resnet(x)
        return x


class ChunkDecoder(nn.Module):
    """One chunk: de-normalised latents [1, 48, T, h, w] to pixels [1, 3, 4T (first chunk: 4T-3), 16h, 16w]."""

    def __init__(self, config: TurboConfig) -> None:
        super().__init__()
        widths = config.decoder_block_out_channels[::-1]
        middle, *layers = config.decoder_layers_per_block[::-1]
        eps = config.resnet_norm_eps
        self.conv_in = Conv3d(CHANNELS, widths[0], (3, 3, 3))
        self.mid_block = Block(widths[0], widths[0], middle, None, eps)
        blocks = zip((widths[0], *widths), widths, layers, config.upsampling[::-1], strict=False)
        self.up_blocks = nn.ModuleList(Block(*block, eps) for block in blocks)
        self.conv_out = Conv3d(widths[-1], 3 * config.patch_size**2, (3, 3, 3))
        self.patch_size = config.patch_size

    def forward(self, x: Tensor, first_chunk: bool) -> Tensor:
        x = self.mid_block(self.conv_in(x), first_chunk)
        for block in self.up_blocks:
            x = block(x, first_chunk)
        x = self.conv_out(F.silu(rms_norm(x, 1e-8)))
        # Depth to space; the offset along the width is the slower index inside a patch, as in Wan2.2.
        B, _, T, H, W = x.shape
        x = x.view(B, 3, self.patch_size, self.patch_size, T, H, W)  # [B, 3, dx, dy, T, H, W]
        return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


class TurboDecoder(nn.Module):
    """Turbo VAED. Parameter names are the released ones (80 tensors at the release's configuration)."""

    def __init__(self, config: TurboConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = ChunkDecoder(config)
        self.requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        """Normalised latents [1, 48, T, h, w] to pixels [1, 3, 4T-3, 16h, 16w], about [-1, 1], in the weights' type."""
        return torch.cat(list(self.decode_chunks(latents)), dim=2)

    decode = forward

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """`decode` a chunk at a time: yields [1, 3, f, 16h, 16w]; the f add up to 4T-3.

        Each chunk is decoded with one latent frame of context on either side, whose pixel frames are dropped.
        The de-normalisation runs in float32 whatever the dtypes of latents and weights (spec: vae.md §1, §3).
        """
        if latents.ndim != 5 or latents.shape[1] != CHANNELS or 0 in latents.shape:
            raise ValueError(f"latents: got shape {list(latents.shape)}, allowed: [1, {CHANNELS}, T, h, w]")
        first, step, ratio = self.config.first_chunk_size, self.config.step_size, self.config.temporal_ratio
        T = latents.shape[2]
        surplus = max(first - T, 0) or (first - T) % step
        end = T + surplus
        z = self._denormalise(torch.cat([latents] + [latents[:, :, -1:]] * surplus, dim=2))
        for start in (0, *range(first, end, step)):
            stop = start + step if start else first
            chunk = self.decoder(z[:, :, max(start - 1, 0) : stop + 1], first_chunk=start == 0)
            drop_front = ratio if start else 0
            drop_back = ratio * (surplus if stop == end else 1)
            yield chunk[:, :, drop_front : chunk.shape[2] - drop_back]

    def _denormalise(self, latents: Tensor) -> Tensor:
        """The decoder's own scale, in the weights' dtype and on their device."""
        weight = self.decoder.conv_in.conv.weight
        z = latents.to(weight.device, torch.float32)
        mean, std = (z.new_tensor(v).view(-1, 1, 1, 1) for v in (LATENT_MEAN, LATENT_STD))
        return (z / (1 / std) + mean).to(weight.dtype)
