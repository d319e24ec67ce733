"""Packing is exact."""

import pytest
import torch

from horsepower.runtime.models.dit import FourierRope
from horsepower.runtime.tokens import Grid, coordinates, patchify, unpatchify
from recordings import find

CASES = [
    (recording, key.removesuffix(".coords"))
    for recording in find("packing_")
    for key in sorted(recording.keys)
    if key.endswith(".coords")
]


@pytest.mark.golden
@pytest.mark.parametrize(("case", "name"), CASES, ids=str)
def test_as_recorded(case, name):
    video, audio, n = case[f"{name}.video"], case[f"{name}.audio"], int(case[f"{name}.text_len"])
    grid = Grid(*video.shape[2:], audio.shape[1])
    coords = coordinates(grid, n, name.rpartition("_")[2])
    assert torch.equal(coords, case[f"{name}.coords"])

    tokens, modality = case[f"{name}.tokens"], case[f"{name}.modality"]
    parts = (patchify(video), audio[0], case[f"{name}.text"][0, :n])
    for m, part in enumerate(parts):
        rows = tokens[modality == m]
        assert torch.equal(rows[:, : part.shape[1]], part)
        assert not rows[:, part.shape[1] :].any()

    out = case[f"{name}.model_out"]
    assert torch.equal(
        unpatchify(out[modality == 0][:, : parts[0].shape[1]], grid.frames, grid.rows, grid.columns),
        case[f"{name}.out_video"],
    )
    assert torch.equal(out[modality == 1][None, :, : audio.shape[2]], case[f"{name}.out_audio"])
    for key in (key for key in case.keys if key.startswith(f"{name}.rope_head_dim")):
        rope = FourierRope(int(key.rpartition("head_dim")[2]), torch.float32, "cpu")(coords)
        torch.testing.assert_close(rope, case[key], rtol=0, atol=1e-6)


def test_input_and_output_channels_are_in_different_orders():
    latent = torch.arange(2 * 1 * 2 * 2).reshape(1, 2, 1, 2, 2)
    assert patchify(latent).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]  # c, dy, dx
    assert unpatchify(torch.tensor([[0, 4, 1, 5, 2, 6, 3, 7]]), 1, 1, 1).equal(latent)  # dy, dx, c


@pytest.mark.parametrize(
    ("pixels", "seconds", "latent", "video"),
    [((448, 256), 4, (26, 16, 28, 101), 2912), ((1920, 1088), 5, (32, 68, 120, 126), 65280)],
)
def test_sizes_of_the_released_pipelines(pixels, seconds, latent, video):
    grid = Grid.of(*pixels, 25 * seconds + 1)
    assert (grid.frames, grid.height, grid.width, grid.audio) == latent
    assert grid.video == video
    assert grid.pixels == pixels


def test_sizes_round_down_to_multiples_of_32():
    assert Grid.of(480, 272, 101).pixels == (480, 256)
    assert Grid.of(1920, 1080, 101).pixels == (1920, 1056)


def test_one_text_token_has_no_place_in_v1():
    grid = Grid(2, 4, 4, 5)
    with pytest.raises(ValueError, match="text, audio: got 1 and 5"):
        coordinates(grid, 1, "v1")
    with pytest.raises(ValueError, match="text, audio: got 4 and 1"):
        coordinates(Grid(3, 4, 4, 1), 4, "v1")
    rope = FourierRope(32, torch.float32, "cpu")(coordinates(grid, 1, "v2"))
    assert rope.isfinite().all()


def test_one_frame_and_one_sound():
    assert FourierRope(32, torch.float32, "cpu")(coordinates(Grid(1, 2, 2, 1), 2, "v1")).isfinite().all()
