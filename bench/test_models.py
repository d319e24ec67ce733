"""Is eager honest? The DiT against the same arithmetic with nothing around it, and its window against a mask."""

from dataclasses import replace

import pytest
import torch

from horsepower.bench import plain
from horsepower.bench.measure import machine, paired, ratio
from horsepower.runtime.foal import generate
from horsepower.runtime.models.attention import windowed_attention
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.presets import FOAL
from horsepower.runtime.tokens import Grid, coordinates

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize("window", [None, 2])
def test_eager_dit(window: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    """One step of a clip of 2 s at 256p; with `window`, three layers of four are windowed."""
    local = tuple(n for n in range(40) if window and n % 4 != 3)
    config = replace(FOAL, local_attn_layers=local, frame_receptive_field=window or 11)
    model, grid = DiT(config), Grid.of(448, 256, 51)
    generate(model, "bench")
    generator = torch.Generator().manual_seed(0)
    video, audio, text = (
        torch.randn(n, c, generator=generator) for n, c in ((grid.video, 192), (grid.audio, 64), (60, 64))
    )
    with torch.no_grad():
        condition = model.condition(text, coordinates(grid, 60))
        weights = model.state_dict()
        run = {
            "eager": lambda: model.velocity(video, audio, condition, grid.frames),
            "plain": lambda: plain.forward(weights, config, video, audio, text, condition.rope, grid.frames),
        }
        torch.testing.assert_close(run["eager"](), run["plain"](), rtol=0.02, atol=0.02)
        seconds = paired(run, rounds=11, warmup=2)
    with capsys.disabled():
        print(f"\n{machine()}\nDiT, window {window}: eager / plain = {ratio(seconds['eager'], seconds['plain'])}")


def test_window_as_a_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """8 k tokens in 26 frames, a window of 11: the loop over frames against a mask over all pairs."""
    frames, tokens = 26, 312
    video = frames * tokens
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(video + 80, h, 64, generator=generator).bfloat16() for h in (4, 2, 2))
    run = {
        "loop": lambda: windowed_attention(q, k, v, frames, video, 11),
        "mask": lambda: plain.mask_attend(q, k, v, frames, video, 11),
    }
    torch.testing.assert_close(run["loop"](), run["mask"](), rtol=0.05, atol=0.01)
    seconds = paired(run, rounds=5, warmup=1)
    with capsys.disabled():
        print(f"\n{machine()}\nwindow: loop / mask = {ratio(seconds['loop'], seconds['mask'])}")
