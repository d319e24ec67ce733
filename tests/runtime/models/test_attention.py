"""Windowed attention against a mask, its ranges against the recordings."""

import pytest
import torch
import torch.nn.functional as F

from horsepower.runtime.models.attention import full_attention, visible_frames, windowed_attention
from recordings import find


def masked(q, k, v, frames, video, window):
    """The same by its definition: softmax over the allowed keys, in float64."""
    tokens = video // frames
    frame = torch.arange(len(q)) // max(tokens, 1)
    near = (frame[:, None] - frame[None, :]).abs() <= window
    rest = torch.arange(len(q)) >= video
    allowed = near | rest[:, None] | rest[None, :]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True).transpose(0, 1)


@pytest.mark.parametrize("frames", [1, 2, 5, 13])
@pytest.mark.parametrize("window", [0, 1, 4, 20])
@pytest.mark.parametrize("rest", [0, 1, 7])
def test_window_is_the_masked_attention(frames, window, rest):
    generator = torch.Generator().manual_seed(frames)
    video = frames * 3
    q, k, v = (torch.randn(video + rest, h, 16, generator=generator) for h in (4, 2, 2))
    got = windowed_attention(q, k, v, frames, video, window)
    torch.testing.assert_close(got.double(), masked(q, k, v, frames, video, window), rtol=1e-5, atol=1e-6)


def test_a_wide_window_is_full_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(20, h, 16, generator=generator).bfloat16() for h in (4, 2, 2))
    assert torch.equal(windowed_attention(q, k, v, 5, 15, 11), full_attention(q, k, v))


def test_the_op_is_sound_for_the_compiler():
    q, k, v = (torch.randn(11, h, 16) for h in (4, 2, 2))
    torch.library.opcheck(torch.ops.horsepower.windowed_attention.default, (q, k, v, 3, 9, 1))


@pytest.mark.parametrize("frames", [0, 3, -1])
def test_frames_divide_the_video(frames):
    q = torch.zeros(10, 2, 16)
    with pytest.raises(ValueError, match=f"frames: got {frames} for 10 video tokens"):
        windowed_attention(q, q, q, frames, 10, 1)


@pytest.mark.golden
@pytest.mark.parametrize("case", find("packing_"), ids=str)
def test_ranges_as_recorded(case):
    window = case.info["frame_receptive_field"]
    for name in (key.removesuffix(".k_ranges") for key in case.keys if key.endswith(".k_ranges")):
        frames = case[f"{name}.video"].shape[2]
        tokens = int((case[f"{name}.modality"] == 0).sum()) // frames
        total = len(case[f"{name}.modality"])
        video = tokens * frames
        k_ranges = [[n * tokens for n in visible_frames(i, frames, window)] for i in range(frames)]
        assert case[f"{name}.k_ranges"].tolist() == [*k_ranges, [video, total], [0, total]]
        q_ranges = [[i * tokens, (i + 1) * tokens] for i in range(frames)]
        assert case[f"{name}.q_ranges"].tolist() == [*q_ranges, [0, video], [video, total]]
