"""The single-stream DiT of HappyHorse-1.0 and daVinci-MagiHuman in plain PyTorch.

Video, audio and text tokens run through the same layers in one sequence, always in that order, so a modality is a
contiguous range of rows. There is no timestep input, no cross-attention and no modulation. Modules carry the names of
the released state dict. Shapes: L tokens, C hidden size, D head_dim, Hq and Hkv heads.

Matrix products run in `dtype` (bfloat16 as released); the residual stream, norms, rotation and activations in float32.
With `dtype=torch.float64` (and such `params_dtype`) the same code is the exact model.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horsepower.runtime.models.attention import full_attention, windowed_attention
from horsepower.runtime.models.dit_config import DiTConfig

EPS = 1e-6
Counts = tuple[int, int, int]  # tokens of video, audio, text


class Condition(NamedTuple):
    """What stays the same over all steps of a stage."""

    text: Tensor  # [n, C] embedded text
    rope: Tensor  # [L, 6 * (D // 8)] sines, then cosines


def widen(x: Tensor) -> Tensor:
    """At least float32; the identity for float32 and float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def swiglu7(u: Tensor) -> Tensor:
    """Clamped SwiGLU on interleaved columns, in the dtype of u: [L, 2 I] -> [L, I]."""
    a, b = u[..., 0::2], u[..., 1::2]
    a, b = a.clamp(max=7), b.clamp(-7, 7)
    return a * torch.sigmoid(1.702 * a) * (b + 1)


def gelu7(u: Tensor) -> Tensor:
    """Clamped sigmoid GELU, in the dtype of u: [L, G] -> [L, G]."""
    z = u.clamp(max=7)
    return z * torch.sigmoid(1.702 * z)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the halves of the first 6 * (D // 8) dimensions: x [L, H, D], rope [L, 6 * (D // 8)] -> [L, H, D]."""
    sin, cos = rope[:, None].chunk(2, dim=-1)
    half = sin.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


class FourierRope(nn.Module):
    """Sines and cosines of (time, row, column), each in D // 8 frequencies, centred in space."""

    bands: Tensor

    def __init__(self, head_dim: int, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        exponent = torch.arange(head_dim // 8, dtype=dtype, device=device) / (head_dim // 8)
        self.register_buffer("bands", 1 / 10000**exponent)

    def forward(self, coords: Tensor) -> Tensor:
        """coords [L, 9]: position, size and reference size in t, h, w -> [L, 6 * (D // 8)] in the dtype of bands."""
        position, size, reference = coords.to(self.bands.dtype).split(3, dim=-1)
        alone = (size == 1) & (reference == 1)
        scale = torch.where(alone, 1.0, (reference - 1) / torch.where(alone, 2.0, size - 1))
        centre = F.pad((size[:, 1:] - 1) / 2, (1, 0))  # time starts at 0
        angle = (((position - centre) * scale)[..., None] * self.bands).flatten(1)
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


class Linear(nn.Module):
    """A bias-free projection; with three experts, one weight a modality, stacked on the output dimension."""

    def __init__(self, inputs: int, outputs: int, experts: int, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts * outputs, inputs, dtype=dtype, device=device))

    def forward(self, x: Tensor, counts: Counts) -> Tensor:
        """[L, inputs] -> [L, outputs]."""
        if self.experts == 1:
            return F.linear(x, self.weight)
        return torch.cat([F.linear(*pair) for pair in zip(x.split(counts), self.weight.chunk(3), strict=True)])


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with gain weight + 1, computed in float32; per modality or not."""

    def __init__(self, dim: int, experts: int, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        self.dim, self.experts = dim, experts
        self.weight = nn.Parameter(torch.zeros(experts * dim, dtype=dtype, device=device))

    def forward(self, x: Tensor, counts: Counts) -> Tensor:
        """[L, ..., dim] -> the same shape and dtype."""
        gain = self.weight + 1
        if self.experts == 1:
            return F.rms_norm(widen(x), (self.dim,), gain, EPS).to(x.dtype)
        parts = zip(widen(x).split(counts), gain.chunk(3), strict=True)
        return torch.cat([F.rms_norm(part, (self.dim,), g, EPS) for part, g in parts]).to(x.dtype)


class Attention(nn.Module):
    """Norm, one projection to q, k, v and gate, q/k norm, rotation, attention, gate, output projection."""

    def __init__(self, config: DiTConfig, layer: int, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        experts = 3 if layer in config.mm_layers else 1
        master = torch.promote_types(dtype, torch.float32)
        C, D, Hq, Hkv = config.hidden_size, config.head_dim, config.num_heads_q, config.num_query_groups
        self.head_dim, self.experts = D, experts
        self.local = layer in config.local_attn_layers and config.frame_receptive_field >= 0
        self.window = config.frame_receptive_field
        self.widths = (Hq * D, Hkv * D, Hkv * D, Hq if config.gating == "per_token" else 0)
        self.pre_norm = RMSNorm(C, experts, master, device)
        self.linear_qkv = Linear(C, sum(self.widths), experts, dtype, device)
        self.q_norm = RMSNorm(D, experts, master, device)
        self.k_norm = RMSNorm(D, experts, master, device)
        self.gate: nn.Parameter | None = None
        if config.gating == "per_head":
            self.gate = nn.Parameter(torch.zeros(experts * Hq, dtype=master, device=device))
        self.linear_proj = Linear(C, C, experts, dtype, device)

    def forward(self, h: Tensor, rope: Tensor, counts: Counts, frames: int) -> Tensor:
        """Residual h [L, C] -> the branch [L, C] in the projections' dtype."""
        dtype = self.linear_qkv.weight.dtype
        n = self.pre_norm(h, counts).to(dtype)
        q, k, v, gate = self.linear_qkv(n, counts).split(self.widths, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))  # [L, H, D]
        q = rotate(self.q_norm(widen(q), counts), rope).to(dtype)
        k = rotate(self.k_norm(widen(k), counts), rope).to(dtype)
        if self.local:
            o = windowed_attention(q, k, v, frames, counts[0], self.window)
        else:
            o = full_attention(q, k, v)
        branch: Tensor = self.linear_proj(self.gated(o, gate, counts).flatten(1), counts)
        return branch

    def gated(self, o: Tensor, per_token: Tensor, counts: Counts) -> Tensor:
        """Scale each head of o [L, Hq, D] by the sigmoid of its gate, in float32."""
        if per_token.shape[-1]:
            factor = torch.sigmoid(widen(per_token))  # [L, Hq]
        elif self.gate is not None:
            gate = torch.sigmoid(self.gate)
            rows = gate.chunk(self.experts)
            factor = (
                gate
                if self.experts == 1
                else torch.cat([row.expand(count, -1) for row, count in zip(rows, counts, strict=True)])
            )
        else:
            return o
        return (widen(o) * factor[..., None]).to(o.dtype)


class MLP(nn.Module):
    """Norm, up-projection, clamped activation, down-projection."""

    def __init__(self, config: DiTConfig, layer: int, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        experts = 3 if layer in config.mm_layers else 1
        gelu = layer in config.gelu7_layers
        C, width = config.hidden_size, config.gelu7_width if gelu else config.swiglu7_width
        self.activation = gelu7 if gelu else swiglu7
        self.pre_norm = RMSNorm(C, experts, torch.promote_types(dtype, torch.float32), device)
        self.up_gate_proj = Linear(C, width if gelu else 2 * width, experts, dtype, device)
        self.down_proj = Linear(width, C, experts, dtype, device)

    def forward(self, h: Tensor, counts: Counts) -> Tensor:
        """Residual h [L, C] -> the branch [L, C], widened to float32."""
        dtype = self.up_gate_proj.weight.dtype
        n = self.pre_norm(h, counts).to(dtype)
        u = widen(self.up_gate_proj(n, counts))
        return widen(self.down_proj(self.activation(u).to(dtype), counts))


class Layer(nn.Module):
    """One transformer layer: h + attention(h), then h + mlp(h)."""

    def __init__(self, config: DiTConfig, layer: int, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        self.attention = Attention(config, layer, dtype, device)
        self.mlp = MLP(config, layer, dtype, device)
        self.post_norm = layer in config.post_norm_layers
        if self.post_norm:
            master = torch.promote_types(dtype, torch.float32)
            experts = 3 if layer in config.mm_layers else 1
            self.attn_post_norm = RMSNorm(config.hidden_size, experts, master, device)
            self.mlp_post_norm = RMSNorm(config.hidden_size, experts, master, device)

    def forward(self, h: Tensor, rope: Tensor, counts: Counts, frames: int) -> Tensor:
        """Residual [L, C] -> residual [L, C]."""
        a = self.attention(h, rope, counts, frames)
        h = h + (self.attn_post_norm(a, counts) if self.post_norm else a)
        d: Tensor = self.mlp(h, counts)
        return h + (self.mlp_post_norm(d, counts) if self.post_norm else d)


class Adapter(nn.Module):
    """Embeds each modality with its own float32 projection."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        C = config.hidden_size
        self.video_embedder = nn.Linear(config.video_in_channels, C, dtype=dtype, device=device)
        self.text_embedder = nn.Linear(config.text_in_channels, C, dtype=dtype, device=device)
        self.audio_embedder = nn.Linear(config.audio_in_channels, C, dtype=dtype, device=device)
        self.rope = FourierRope(config.head_dim, dtype, device)


class Block(nn.Module):
    """The stack of layers."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, i, dtype, device) for i in range(config.num_layers))

    def forward(self, h: Tensor, rope: Tensor, counts: Counts, frames: int) -> Tensor:
        """Residual [L, C] -> residual [L, C]."""
        for layer in self.layers:
            h = layer(h, rope, counts, frames)
        return h


class DiT(nn.Module):
    """Noisy video and audio tokens with text in, their velocities (noise minus data) out.

    Parameters are left uninitialised but for the norms: load or generate them. `device="meta"` allocates nothing.
    """

    def __init__(
        self,
        config: DiTConfig,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        master = torch.promote_types(dtype, torch.float32)
        C = config.hidden_size
        self.config = config
        self.adapter = Adapter(config, master, device)
        self.block = Block(config, dtype, device)
        self.final_norm_video = RMSNorm(C, 1, master, device)
        self.final_norm_audio = RMSNorm(C, 1, master, device)
        self.final_linear_video = nn.Linear(C, config.video_in_channels, bias=False, dtype=master, device=device)
        self.final_linear_audio = nn.Linear(C, config.audio_in_channels, bias=False, dtype=master, device=device)

    def condition(self, text: Tensor, coords: Tensor) -> Condition:
        """Text [n, text channels] and coords [L, 9], both float32, as the layers use them; once a stage."""
        return Condition(self.adapter.text_embedder(text).to(self.config.params_dtype), self.adapter.rope(coords))

    def velocity(self, video: Tensor, audio: Tensor, condition: Condition, frames: int) -> tuple[Tensor, Tensor]:
        """video [V, video channels], audio [A, audio channels] -> their velocities, same shapes, float32."""
        dtype = self.config.params_dtype
        counts = (video.shape[0], audio.shape[0], condition.text.shape[0])
        embedded = (self.adapter.video_embedder(video).to(dtype), self.adapter.audio_embedder(audio).to(dtype))
        h = self.block(torch.cat((*embedded, condition.text)), condition.rope, counts, frames)
        h_video, h_audio, _ = h.split(counts)
        return (
            self.final_linear_video(self.final_norm_video(h_video, counts)),
            self.final_linear_audio(self.final_norm_audio(h_audio, counts)),
        )

    def forward(self, video: Tensor, audio: Tensor, text: Tensor, coords: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """One step from raw inputs.

        video [V, video channels], audio [A, audio channels], text [n, text channels], coords [V + A + n, 9]
        (position, size, reference size in t, h, w), all float32; frames: latent frames that the V tokens make up.
        Returns the velocities of video and audio, float32, in their inputs' shapes.
        """
        return self.velocity(video, audio, self.condition(text, coords), frames)
