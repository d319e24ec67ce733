"""Pickles become safetensors in a child process, whole or not at all."""

import os
import pickle
import resource

import pytest
import torch
from safetensors.torch import load_file

from horsepower.runtime.convert import convert

TENSORS = {"a.weight": torch.randn(3, 4), "b.bias": torch.arange(5).bfloat16()}


def same(path, tensors):
    got = load_file(path)
    return got.keys() == tensors.keys() and all(torch.equal(got[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_plain_state_dict(tmp_path, zipped):
    source = tmp_path / "Wan2.2_VAE.pth"
    torch.save(TENSORS, source, _use_new_zipfile_serialization=zipped)
    target = convert(source)
    assert target == tmp_path / "Wan2.2_VAE.safetensors"
    assert same(target, TENSORS)


def test_a_training_checkpoint(tmp_path):
    source = tmp_path / "checkpoint.ckpt"
    averaged = {f"module.{key}": value for key, value in TENSORS.items()}
    torch.save({"ema_state_dict": averaged, "state_dict": {"x": torch.zeros(1)}, "step": 340000}, source)
    assert same(convert(source, tmp_path / "out.safetensors"), TENSORS)


def test_shared_and_strided_tensors(tmp_path):
    base = torch.randn(6, 6)
    torch.save({"a": base, "b": base, "c": base.T, "d": base[::2]}, tmp_path / "w.pt")
    assert same(convert(tmp_path / "w.pt"), {"a": base, "b": base, "c": base.T, "d": base[::2]})


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def hostile(path):
    path.write_bytes(pickle.dumps({"a": Hostile(path.parent / "owned")}))


@pytest.mark.parametrize(
    "write",
    [
        hostile,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no pickle"),
        lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 100),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"epoch": 3}, path),
        lambda path: (torch.save(TENSORS, path), os.truncate(path, 700)),
    ],
)
def test_bad_files_leave_nothing(tmp_path, write):
    source, target = tmp_path / "bad.ckpt", tmp_path / "bad.safetensors"
    write(source)
    target.write_bytes(b"from before")
    with pytest.raises(ValueError, match=r"^source: got .*bad\.ckpt.*, allowed: a checkpoint that holds tensors only"):
        convert(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.ckpt", "bad.safetensors"]
    assert target.read_bytes() == b"from before"


def test_a_full_disk_is_the_targets_fault(tmp_path):
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "w.pt")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(ValueError, match=r"^target: got .*w\.safetensors.*, allowed: a path with room"):
            convert(tmp_path / "w.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_bad_paths(tmp_path):
    with pytest.raises(ValueError, match="source: got"):
        convert(tmp_path / "missing.ckpt")
    torch.save(TENSORS, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"target: got .*w\.bin"):
        convert(tmp_path / "w.pt", tmp_path / "w.bin")
    with pytest.raises(ValueError, match="target: got"):
        convert(tmp_path / "w.pt", tmp_path / "nowhere" / "w.safetensors")
