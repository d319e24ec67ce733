"""The DiT's arithmetic with nothing around it: one function, weights in a dictionary. What eager is held against."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from horsepower.runtime.models.dit_config import DiTConfig


def forward(
    w: Mapping[str, Tensor], config: DiTConfig, video: Tensor, audio: Tensor, text: Tensor, rope: Tensor, frames: int
) -> tuple[Tensor, Tensor]:
    """The same as `DiT.velocity` for a configuration with per-token gates and no post norms; rope [L, 6 * (D // 8)]."""
    D, Hq, Hkv = config.head_dim, config.num_heads_q, config.num_query_groups
    counts = [len(video), len(audio), len(text)]
    parts = {"video": video, "audio": audio, "text": text}
    h = torch.cat(
        [F.linear(x, w[f"adapter.{m}_embedder.weight"], w[f"adapter.{m}_embedder.bias"]) for m, x in parts.items()]
    )
    sin, cos = (x[:, None] for x in rope.chunk(2, dim=-1))
    for n in range(config.num_layers):
        p = f"block.layers.{n}."
        experts = 3 if n in config.mm_layers else 1

        def linear(x: Tensor, key: str, p: str = p, experts: int = experts) -> Tensor:
            if experts == 1:
                return F.linear(x, w[p + key])
            return torch.cat([F.linear(a, b) for a, b in zip(x.split(counts), w[p + key].chunk(3), strict=True)])

        def norm(x: Tensor, key: str, p: str = p, experts: int = experts) -> Tensor:
            gains = (w[p + key] + 1).chunk(experts)
            rows = x.split(counts) if experts == 3 else (x,)
            normed = [F.rms_norm(a, (a.shape[-1],), g, 1e-6) for a, g in zip(rows, gains, strict=True)]
            return normed[0] if experts == 1 else torch.cat(normed)

        y = linear(norm(h, "attention.pre_norm.weight").bfloat16(), "attention.linear_qkv.weight")
        q, k, v, g = y.split([Hq * D, Hkv * D, Hkv * D, Hq], dim=-1)
        q = _rotate(norm(q.float().unflatten(-1, (Hq, D)), "attention.q_norm.weight"), sin, cos).bfloat16()
        k = _rotate(norm(k.float().unflatten(-1, (Hkv, D)), "attention.k_norm.weight"), sin, cos).bfloat16()
        local = n in config.local_attn_layers
        o = _attend(
            q, k, v.unflatten(-1, (Hkv, D)), frames, counts[0], config.frame_receptive_field if local else frames
        )
        o = (o.float() * torch.sigmoid(g.float())[..., None]).bfloat16()
        h = h + linear(o.flatten(1), "attention.linear_proj.weight")
        u = linear(norm(h, "mlp.pre_norm.weight").bfloat16(), "mlp.up_gate_proj.weight").float()
        if n in config.gelu7_layers:
            z = u.clamp(max=7)
            act = z * torch.sigmoid(1.702 * z)
        else:
            a, b = u[..., 0::2].clamp(max=7), u[..., 1::2].clamp(-7, 7)
            act = a * torch.sigmoid(1.702 * a) * (b + 1)
        h = h + linear(act.bfloat16(), "mlp.down_proj.weight").float()
    ends = zip(h.split(counts), ("video", "audio"), strict=False)
    first, second = (
        F.linear(F.rms_norm(x, (x.shape[-1],), w[f"final_norm_{m}.weight"] + 1, 1e-6), w[f"final_linear_{m}.weight"])
        for x, m in ends
    )
    return first, second


def _rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    half = sin.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, frames: int, video: int, window: int) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if window >= frames:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0].transpose(0, 1)
    n, pieces = video // frames, []
    for i in range(frames):
        first, last = max(0, i - window) * n, min(frames, i + window + 1) * n
        keys, values = (torch.cat((x[:, :, first:last], x[:, :, video:]), dim=2) for x in (k, v))
        pieces.append(F.scaled_dot_product_attention(q[:, :, i * n : (i + 1) * n], keys, values, enable_gqa=True))
    pieces.append(F.scaled_dot_product_attention(q[:, :, video:], k, v, enable_gqa=True))
    return torch.cat(pieces, dim=2)[0].transpose(0, 1)


def mask_attend(q: Tensor, k: Tensor, v: Tensor, frames: int, video: int, window: int) -> Tensor:
    """The window as a mask over all pairs; shapes as in `full_attention`."""
    row = torch.arange(len(q), device=q.device)
    frame, rest = row * frames // max(video, 1), row >= video
    allowed = ((frame[:, None] - frame).abs() <= window) | rest[:, None] | rest
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)[0].transpose(0, 1)
