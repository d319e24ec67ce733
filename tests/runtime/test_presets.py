"""Sizes."""

import pytest

from horsepower.runtime.presets import sizes


@pytest.mark.parametrize(
    ("asked", "base", "final", "model"),
    [
        ("256p", (448, 256), (448, 256), None),
        ("540p", (448, 256), (896, 512), "540p_sr"),
        ("1080p", (448, 256), (1920, 1088), "1080p_sr"),
        ((480, 272), (480, 256), (480, 256), None),
        ((256, 448), (256, 448), (256, 448), None),
        ((896, 512), (448, 256), (896, 512), "540p_sr"),
        ((512, 896), (256, 448), (512, 896), "540p_sr"),
        ((1920, 1080), (448, 256), (1920, 1056), "1080p_sr"),
        ((1024, 1024), (352, 352), (1024, 1024), "1080p_sr"),
        ((32, 32), (32, 32), (32, 32), None),
        ((8192, 32), (5408, 32), (8192, 32), "540p_sr"),
    ],
)
def test_stages_of_a_resolution(asked, base, final, model):
    got = sizes(asked)
    assert got.final == final
    assert got.super_resolution == model
    assert got.base == base
    assert all(side % 32 == 0 and side >= 32 for side in (*got.base, *got.final))
