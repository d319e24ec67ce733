"""Safetensors into modules, one tensor at a time: files are mapped, values go straight to their device and dtype.

Nothing here reads a pickle. What does not fit is a ValueError that names the file and the keys.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from horsepower.quant.quantised import Values, plain

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "SHA256SUMS"

# A key of the file -> the module's key, or None to leave it out.
Rename = Callable[[str], str | None]


@dataclass(frozen=True)
class Weights:
    """Where each tensor of a checkpoint lies: key -> safetensors file."""

    source: Path
    files: Mapping[str, Path]

    @classmethod
    def find(cls, path: str | os.PathLike[str]) -> "Weights":
        """A safetensors file, or a folder with an index and its shards or with one file.

        Where a `SHA256SUMS` manifest lies beside the files, it must name them all and agree.
        Raises ValueError for what is missing, cut short, or other than the manifest says.
        """
        path = Path(path)
        if path.is_dir() and (path / INDEX).exists():
            weights = cls(path, _indexed(path))
        else:
            file = path / SINGLE if path.is_dir() else path
            if not file.is_file():
                allowed = f"a safetensors file, or a folder with {INDEX} or {SINGLE}"
                raise ValueError(f"checkpoint: got {path}, where there is no {file.name}, allowed: {allowed}")
            weights = cls(path, dict.fromkeys(read_header(file), file))
        _check_manifest(set(weights.files.values()))
        return weights

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the headers alone. Raises ValueError where a file lacks an indexed key."""
        found: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self.files.values())):
            header = read_header(file)
            for key in (key for key, home in self.files.items() if home == file):
                if key not in header:
                    raise ValueError(f"checkpoint {file}: got no tensor {key}, allowed: what {INDEX} says of it")
                found[key] = header[key]
        return found


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file. Raises ValueError if it is no such file, or cut short."""
    with _opened(file) as f:
        return {key: tuple(f.get_slice(key).get_shape()) for key in f.keys()}  # noqa: SIM118  (no mapping)


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors. Raises ValueError as `read_header`."""
    with _opened(file) as f:
        return f.metadata() or {}


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {file}: got {error}, allowed: a whole safetensors file") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError if there is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name}: got {error} in {file}, allowed: a JSON object") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file.name}: got {type(values).__name__} in {file}, allowed: a JSON object")
    return values


def _indexed(folder: Path) -> dict[str, Path]:
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"checkpoint {folder / INDEX}: got no weight_map, allowed: keys with their files")
    for name in sorted(set(names.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder}: got no shard {name}, allowed: every file that {INDEX} names")
    return {key: folder / name for key, name in names.items()}


def _check_manifest(files: set[Path]) -> None:
    for file in sorted(files):
        manifest = file.parent / MANIFEST
        if not manifest.is_file():
            continue
        lines = (line.split(maxsplit=1) for line in manifest.read_text("utf-8", "replace").splitlines())
        # sha256sum marks binary mode with a star, and repeats the folder it was told.
        sums = {Path(line[1].removeprefix("*")).name: line[0] for line in lines if len(line) == 2}
        if file.name not in sums:
            raise ValueError(f"checkpoint {file}: got no line in {manifest.name}, allowed: one for each file")
        with open(file, "rb") as f:
            got = hashlib.file_digest(f, "sha256").hexdigest()
        if got != sums[file.name].lower():
            raise ValueError(f"checkpoint {file}: got sha256 {got}, allowed: {sums[file.name]} of {manifest.name}")


class Tensors(Mapping[str, Tensor]):
    """Values for a module's parameters and buffers by name, each read from its file whenever it is asked for.

    They have the module's dtypes and shapes and lie on a device; a tensor that has the right number of values in
    another arrangement of ones ([C] for [1, C, 1]) is reshaped.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Weights,
        device: torch.device | str,
        rename: Rename = lambda key: key,
        defaults: Mapping[str, Tensor] | None = None,
    ):
        """`module` may be on the meta device; defaults: values for keys that a checkpoint may lack.

        Raises ValueError for missing, unexpected or misshapen keys.
        """
        self._targets = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        names = {key: name for key in weights.files if (name := rename(key)) is not None}
        self._defaults = {name: value for name, value in (defaults or {}).items() if name not in names.values()}
        _check_keys(weights, names, self._targets, set(self._defaults))
        self._keys = {name: key for key, name in names.items()}
        self._files, self._device = weights.files, device
        self._opened: dict[Path, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, name: str) -> Tensor:
        """Raises ValueError for values that are not finite."""
        like = self._targets[name]
        if name in self._defaults:
            return _placed(self._defaults[name], like, self._device, f"default of {name}")
        key = self._keys[name]
        return _placed(self.read(key), like, self._device, f"checkpoint {self._files[key]}: {key}")

    def read(self, key: str) -> Tensor:
        """What a file holds under a key of its own, as it is."""
        file = self._files[key]
        if file not in self._opened:
            self._opened[file] = _opened(file)
        found: Tensor = self._opened[file].get_tensor(key)
        return found


def load(
    module: nn.Module,
    weights: Weights,
    device: torch.device | str,
    rename: Rename = lambda key: key,
    defaults: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill a module that stands on the meta device; its own dtypes and shapes are what the values become.

    The arguments are those of `Tensors`. Host memory peaks at the finished weights plus one tensor.
    Raises ValueError for missing, unexpected or misshapen keys (before any value is read) and for values that are not
    finite.
    """
    fill(module, Tensors(module, weights, device, rename, defaults), device)


def fill(
    module: nn.Module, values: Values, device: torch.device | str, prefix: str = "", skip: Sequence[str] = ()
) -> None:
    """Give a module, which may stand on the meta device, values on a device, one by one.

    values: by the names of its parameters and buffers, with a prefix. skip: submodules that have theirs.
    Raises ValueError for values of eight bits.
    """
    own = tuple(f"{path}." for path in skip)
    for name, old in [*module.named_parameters(), *module.named_buffers()]:
        if name.startswith(own):
            continue
        owner_name, _, leaf = name.rpartition(".")
        new = plain(prefix + name, values[prefix + name]).to(device)
        setattr(
            module.get_submodule(owner_name),
            leaf,
            nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new,
        )


def _check_keys(weights: Weights, names: Mapping[str, str], targets: Mapping[str, Tensor], known: set[str]) -> None:
    missing = sorted(set(targets) - set(names.values()) - known)
    extra = sorted(key for key, name in names.items() if name not in targets)
    for kind, keys in (("is missing", missing), ("has unexpected", extra)):
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise ValueError(
                f"checkpoint {weights.source}: {kind} {', '.join(keys[:5])}{more}, allowed: exactly the model's keys"
            )
    for key, shape in weights.shapes().items():
        if key in names:
            expected = tuple(targets[names[key]].shape)
            if [n for n in shape if n != 1] != [n for n in expected if n != 1]:
                raise ValueError(
                    f"checkpoint {weights.files[key]}: {key}: got shape {list(shape)}, allowed: {list(expected)}"
                )


def _placed(value: Tensor, like: Tensor, device: torch.device | str, what: str) -> Tensor:
    if not value.is_floating_point() or value.itemsize < 2:
        raise ValueError(f"{what}: got {value.dtype}, allowed: float32, bfloat16, float16")
    new = torch.empty(like.shape, dtype=like.dtype, device=device)
    new.copy_(value.reshape(like.shape))
    if new.is_floating_point() and not all(torch.isfinite(bound) for bound in torch.aminmax(new)):
        raise ValueError(f"{what}: got NaN or infinite values, allowed: finite ones")
    return new
