"""The plain formulation computes what the model does."""

from dataclasses import replace

import pytest
import torch

from horsepower.bench import plain
from horsepower.runtime.foal import generate
from horsepower.runtime.models.attention import windowed_attention
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.presets import FOAL
from horsepower.runtime.tokens import Grid, coordinates


@pytest.mark.parametrize("local", [(), (0, 2, 4)])
def test_forward(local):
    config = replace(
        FOAL, num_layers=5, mm_layers=(0, 4), gelu7_layers=(0,), local_attn_layers=local, frame_receptive_field=1
    )
    model, grid = DiT(config), Grid.of(96, 64, 13)
    generate(model, "plain")
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, c, generator=generator) for n, c in ((grid.video, 192), (grid.audio, 64), (7, 64))]
    with torch.no_grad():
        condition = model.condition(parts[2], coordinates(grid, 7))
        want = model.velocity(*parts[:2], condition, grid.frames)
        got = plain.forward(model.state_dict(), config, *parts, condition.rope, grid.frames)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_mask():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(23, h, 16, generator=generator) for h in (4, 2, 2))
    torch.testing.assert_close(plain.mask_attend(q, k, v, 5, 20, 1), windowed_attention(q, k, v, 5, 20, 1))
