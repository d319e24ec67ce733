"""The recordings themselves: a folder that holds none, or some that no test would find, is a mistake."""

import pytest

from recordings import Recording, folder

# Prefix of the file -> endings of keys without which no test would read it; weights are read by the cases they serve.
KINDS = {
    "dit_": ("out", "trace.block_in"),
    "e2e_": ("final.video",),
    "sampler_": (".velocity", "zero_snr_table"),
    "packing_": (".coords",),
    "turbo_": ("z",),
    "wan22_": ("latent_video",),
    "audio_": ("wave",),
}


@pytest.mark.golden
def test_every_recording_is_of_a_known_kind():
    files = sorted(folder().glob("*.safetensors"))
    assert files, f"{folder()} holds no recordings"
    for file in files:
        kind = next((kind for kind in KINDS if file.name.startswith(kind)), None)
        assert kind, f"{file.name} is of no known kind: {', '.join(KINDS)}"
        keys = Recording(file).keys
        assert any(key.startswith(("w.", "adapter.")) or key.endswith(KINDS[kind]) for key in keys), file.name
