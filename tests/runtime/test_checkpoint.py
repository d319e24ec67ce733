"""Loading: strict, streamed, and clear about what is wrong."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from horsepower.runtime.checkpoint import INDEX, MANIFEST, Weights, load
from horsepower.runtime.foal import generate
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit_config import DiTConfig

CONFIG = DiTConfig(
    num_layers=2, hidden_size=32, head_dim=16, num_query_groups=1, text_in_channels=8, mm_layers=(0,), gelu7_layers=(0,)
)


@pytest.fixture(scope="module")
def state():
    model = DiT(CONFIG, torch.float32)
    generate(model, "checkpoint")
    return dict(model.state_dict())


def write_shards(folder, tensors, shards=3):
    folder.mkdir(exist_ok=True)
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def loaded(path, dtype=torch.bfloat16, **kwargs):
    model = DiT(CONFIG, dtype, "meta")
    load(model, Weights.find(path), "cpu", **kwargs)
    return model.state_dict()


def test_shards_are_cast_to_the_models_dtypes(tmp_path, state):
    got = loaded(write_shards(tmp_path / "dit", state))
    for key, value in state.items():
        linear = value.ndim == 2 and key.startswith("block.")
        assert got[key].dtype == (torch.bfloat16 if linear else torch.float32)
        assert torch.equal(got[key], value.to(got[key].dtype))


def test_one_file_and_mixed_dtypes(tmp_path, state):
    mixed = {k: v.bfloat16() if k.startswith("block.") and v.ndim == 2 else v for k, v in state.items()}
    save_file(mixed, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        got = loaded(path)
        assert all(torch.equal(got[key], value) for key, value in mixed.items())


def test_what_is_loaded_outlives_its_files(tmp_path, state):
    save_file(state, tmp_path / "model.safetensors")
    got = loaded(tmp_path, torch.float32)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 10)
    assert all(torch.equal(got[key], value) for key, value in state.items())


def test_a_default_fills_a_missing_key(tmp_path, state):
    key = "adapter.rope.bands"
    save_file({k: v for k, v in state.items() if k != key}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is missing adapter.rope.bands"):
        loaded(tmp_path)
    assert torch.equal(loaded(tmp_path, defaults={key: state[key]})[key], state[key])
    rounded = state | {key: state[key] * 0.5}
    save_file(rounded, tmp_path / "model.safetensors")
    assert torch.equal(loaded(tmp_path, defaults={key: state[key]})[key], rounded[key])  # the file goes before


def test_missing_and_unexpected_keys_are_named(tmp_path, state):
    few = {key: value for key, value in state.items() if "attention" not in key}
    save_file(few, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is missing block\.layers\.0\.attention\.k_norm\.weight, .* and 5 more"):
        loaded(tmp_path)
    save_file(state | {"surprise": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has unexpected surprise, allowed: exactly"):
        loaded(tmp_path)


def test_a_wrong_shape_is_named(tmp_path, state):
    save_file(state | {"final_linear_audio.weight": torch.zeros(63, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"final_linear_audio\.weight: got shape \[63, 32\], allowed: \[64, 32\]"):
        loaded(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_named(tmp_path, state, value):
    key = "block.layers.1.mlp.down_proj.weight"
    broken = state[key].clone()
    broken[3, 5] = value
    save_file(state | {key: broken}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model\.safetensors: block\.layers\.1\.mlp\.down_proj\.weight: got NaN or inf"
    ):
        loaded(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool])
def test_codes_are_no_weights(tmp_path, state, dtype):
    save_file(state | {"final_norm_video.weight": torch.zeros(32).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"final_norm_video.weight: got {dtype}, allowed: float32"):
        loaded(tmp_path)


def test_a_missing_shard_is_named(tmp_path, state):
    folder = write_shards(tmp_path / "dit", state)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"got no shard model-00002-of-00003\.safetensors"):
        Weights.find(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, 5000])
def test_a_truncated_shard_is_named(tmp_path, state, keep):
    folder = write_shards(tmp_path / "dit", state)
    shard = folder / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model-00003-of-00003\.safetensors: got .*, allowed: a whole safetensors"):
        loaded(folder)


def test_a_shard_without_its_key_is_named(tmp_path, state):
    folder = write_shards(tmp_path / "dit", state)
    index = json.loads((folder / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    key = next(key for key, file in index["weight_map"].items() if file == first)
    index["weight_map"][key] = second
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"got no tensor {key}"):
        loaded(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\0"])
def test_a_broken_index_is_named(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=INDEX):
        Weights.find(tmp_path)


def test_an_index_may_not_point_outside_its_folder(tmp_path, state):
    save_file(state, tmp_path / "outside.safetensors")
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(state, "../outside.safetensors")}))
    with pytest.raises(ValueError, match="got no shard"):
        Weights.find(tmp_path / "dit")


@pytest.mark.parametrize("path", ["nothing", "nothing.safetensors", "."])
def test_nothing_there(tmp_path, path):
    with pytest.raises(ValueError, match="checkpoint: got"):
        Weights.find(tmp_path / path)


def test_a_manifest_is_checked(tmp_path, state):
    folder = write_shards(tmp_path / "dit", state)
    files = sorted(folder.glob("*.safetensors"))
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    manifest = folder / MANIFEST
    manifest.write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    Weights.find(folder)
    manifest.write_text("".join(f"{digest.upper()} *{name}\n" for name, digest in sums.items()))  # as Windows writes it
    Weights.find(folder)
    manifest.write_text("".join(f"{digest}  ./{name}\n" for name, digest in sums.items()))
    Weights.find(folder)
    manifest.write_bytes(b"\xff\xfe garbage\n")
    with pytest.raises(ValueError, match="got no line in SHA256SUMS"):
        Weights.find(folder)
    manifest.write_text("".join(f"{digest.upper()} *{name}\n" for name, digest in sums.items()))
    data = bytearray(files[1].read_bytes())
    data[-1] ^= 1
    files[1].write_bytes(data)
    with pytest.raises(ValueError, match=rf"{files[1].name}: got sha256 .*, allowed: {sums[files[1].name].upper()}"):
        Weights.find(folder)


MEASURE = """
import sys, threading, time, torch
from dataclasses import replace
from horsepower.runtime.checkpoint import Weights, load
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit_config import DiTConfig

config = DiTConfig.from_dict({config})
def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))
model = DiT(config, torch.bfloat16, "meta")
weights = Weights.find(sys.argv[1])
before, peak, done = anonymous(), 0, False
def sample():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=sample); thread.start()
load(model, weights, "cpu"); done = True; thread.join()
finished = sum(t.numel() * t.element_size() for t in model.state_dict().values())
largest = max(t.numel() * t.element_size() for t in model.state_dict().values())
print(peak - before, finished, largest)
"""


@pytest.mark.slow
def test_memory_peaks_at_the_weights_and_one_tensor(tmp_path):
    """A float32 checkpoint of 3.4 GB in shards, as the distilled model is published."""
    config = DiTConfig(
        num_layers=8, hidden_size=2560, head_dim=128, num_query_groups=4, mm_layers=(0, 7), gelu7_layers=(0,)
    )
    shapes = {key: value.shape for key, value in DiT(config, device="meta").state_dict().items()}
    weight_map = {}
    for i, (key, shape) in enumerate(shapes.items()):
        file = f"model-{i + 1:05d}-of-{len(shapes):05d}.safetensors"
        save_file({key: torch.full(shape, 0.5)}, tmp_path / file)
        weight_map[key] = file
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) > 3e9
    child = subprocess.run(
        [sys.executable, "-c", MEASURE.format(config=config.to_dict()), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, finished, largest = map(int, child.stdout.split())
    print(f"anonymous peak {peak / 2**30:.3f} GiB, weights {finished / 2**30:.3f}, largest {largest / 2**30:.3f}")
    assert peak < finished + largest
