"""The recordings themselves: a folder that holds none, or some that no test would find, is a mistake."""

import pytest

from recordings import folder

KINDS = ("dit_", "e2e_", "sampler_", "packing_", "turbo_", "wan22_", "audio_")


@pytest.mark.golden
def test_every_recording_is_of_a_known_kind():
    files = sorted(folder().glob("*.safetensors"))
    assert files, f"{folder()} holds no recordings"
    assert not [file.name for file in files if not file.name.startswith(KINDS)]
