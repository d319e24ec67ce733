"""Recordings of the reference implementation: where they lie, which there are, and how two tensors compare.

The folder is HORSEPOWER_GOLDEN if set, else a full set beside the checkout, else the small set that is committed.
Files are found by their prefix and by the tensors in them, so further recordings of a kind run without a change.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]


def folder() -> Path:
    if chosen := os.environ.get("HORSEPOWER_GOLDEN"):
        return Path(chosen)
    beside = ROOT.parent / "shared" / "golden"
    return beside if beside.is_dir() else ROOT / "tests" / "golden"


@dataclass(frozen=True)
class Recording:
    """One file: its tensors, and the JSON that describes them."""

    path: Path

    @cached_property
    def info(self) -> dict[str, Any]:
        with safe_open(self.path, framework="pt") as f:
            return json.loads((f.metadata() or {}).get("info", "{}"))

    @cached_property
    def keys(self) -> set[str]:
        with safe_open(self.path, framework="pt") as f:
            return set(f.keys())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path)

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def sibling(self, name: str) -> "Recording":
        return Recording(self.path.with_name(name))

    def __str__(self) -> str:
        return self.path.stem


def find(prefix: str, *needs: str) -> list[Recording]:
    """Recordings whose file name begins with `prefix` and that hold tensors with all the names in `needs`."""
    found = [Recording(path) for path in sorted(folder().glob(f"{prefix}*.safetensors"))]
    return [recording for recording in found if recording.keys.issuperset(needs)]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance, in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def max_error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest value; shapes must agree."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())
