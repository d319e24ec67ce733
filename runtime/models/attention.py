"""Attention of the DiT: every token to every token, or video frames through a window of neighbouring frames."""

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without a mask, scaled by 1/sqrt(D).

    q [Lq, Hq, D], k and v [Lk, Hkv, D] of one dtype -> [Lq, Hq, D]. Query head j reads kv head j // (Hq / Hkv).
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0].transpose(0, 1)


def visible_frames(frame: int, frames: int, window: int) -> tuple[int, int]:
    """The half-open range of latent frames that the video tokens of `frame` attend to."""
    return max(0, frame - window), min(frames, frame + window + 1)


@torch.library.custom_op("horsepower::windowed_attention", mutates_args=())
def windowed_attention(q: Tensor, k: Tensor, v: Tensor, frames: int, video: int, window: int) -> Tensor:
    """Attention in which a video token sees the frames within `window` of its own, and all audio and text.

    Audio and text tokens see everything. Rows are video (frame-major), audio, text; the first `video` rows are
    `frames` frames of equal size. Shapes as in `full_attention`. MagiHuman's 1080p super-resolution model uses it.

    Raises ValueError if `frames` does not divide `video`.

    A custom op because a loop over frames, the fastest plain formulation, cannot be exported with a dynamic count.
    """
    if frames < 1 or video % frames:
        raise ValueError(f"frames: got {frames} for {video} video tokens, allowed: a divisor of them")
    tokens = video // frames
    out = torch.empty_like(q)
    for (first, last), group in groupby(range(frames), lambda i: visible_frames(i, frames, window)):
        members = list(group)
        rows = slice(members[0] * tokens, (members[-1] + 1) * tokens)
        keys, values = (torch.cat((x[first * tokens : last * tokens], x[video:])) for x in (k, v))
        out[rows] = full_attention(q[rows], keys, values)
    if video < len(q):
        out[video:] = full_attention(q[video:], k, v)
    return out


@windowed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, frames: int, video: int, window: int) -> Tensor:
    return torch.empty_like(q)
