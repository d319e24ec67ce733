"""Checkpoints of eight bits: one model in a folder, as published ones are, and what it says of itself in each file.

`W`, of those weights that the scheme quantises, holds codes (F8_E4M3) in the module's shape, `W_scale` their scales
(F32, [rows, 1]); all others are as the model runs with them. Metadata, under `horsepower.quantised`: JSON with the
version of this format, scheme, keep-list, budgets, which model it is, and a digest of its configuration.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from horsepower.graph.plan import Plan
from horsepower.quant.quantised import Quantised, Values, check_pair, plain, quantised
from horsepower.quant.scheme import BY_CHANNEL, Scheme
from horsepower.runtime.checkpoint import INDEX, MANIFEST, SINGLE, Tensors, Weights, read_metadata
from horsepower.runtime.executor import QUANTISE
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit_config import DiTConfig
from horsepower.runtime.presets import MODELS

KEY = "horsepower.quantised"
VERSION = 1
SCALE = "_scale"  # W -> W_scale; no module has a parameter of such a name
SHARD = 2**31  # bytes, and so the host memory that writing takes


@dataclass(frozen=True)
class Stored:
    """What a quantised checkpoint says of itself."""

    model: str  # such as distill
    config: str  # digest of its configuration
    scheme: str
    keep: tuple[str, ...]  # layers that are not quantised
    budget: float  # relative L2 of a layer's output that none of the others exceeds
    latent_budget: float | None  # the same of the final latents
    preset: str | None = None  # whose weights these are; the other parts are its own

    @classmethod
    def of(cls, folder: Path) -> "Stored | None":
        """From a model's folder; None if it is not quantised. Raises ValueError for a version that is not known."""
        files = sorted(folder.glob("*.safetensors"))
        said = {file: read_metadata(file).get(KEY) for file in files}
        if len(set(said.values())) > 1:
            odd = next(file for file in files if said[file] != said[files[0]])
            raise ValueError(f"checkpoint {odd}: got another quantisation than {files[0].name}, allowed: the same")
        text = said[files[0]] if files else None
        return None if text is None else cls._read(text, files[0])

    @classmethod
    def _read(cls, text: str, file: Path) -> "Stored":
        odd = f"checkpoint {file}: got {KEY} {text[:100]!r}"
        try:
            values = json.loads(text)
            version = values.pop("version")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{odd}, allowed: JSON with a version") from error
        if version != VERSION:
            raise ValueError(f"checkpoint {file}: got version {version!r} of {KEY}, allowed: {VERSION}")
        try:
            found = cls(**values | {"keep": tuple(map(str, values["keep"]))})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{odd}, allowed: {', '.join(cls.__dataclass_fields__)}") from error
        if found.scheme not in BY_CHANNEL:
            raise ValueError(f"checkpoint {file}: got scheme {found.scheme!r}, allowed: {', '.join(BY_CHANNEL)}")
        return found

    def metadata(self) -> dict[str, str]:
        """As safetensors files carry it."""
        return {"format": "pt", KEY: json.dumps({"version": VERSION, **dataclasses.asdict(self)})}

    def check(self, model: str, config: DiTConfig) -> "Stored":
        """The checkpoint itself. Raises ValueError if it is another model's."""
        if self.model != model:
            raise ValueError(f"model {model}: got a quantised checkpoint of {self.model}, allowed: one of {model}")
        if self.config != digest(config):
            raise ValueError(f"model {model}: got a quantised checkpoint of another configuration, allowed: its own")
        return self

    def scheme_for(self, given: Scheme | None) -> Scheme:
        """Its own scheme, or another that reads the same codes. Raises ValueError for one that does not."""
        if given is None:
            return BY_CHANNEL[self.scheme].keeping(self.keep)
        if given.name not in BY_CHANNEL or given.keep not in ((), self.keep):
            kept = f" keeping {len(given.keep)} patterns" if given.keep else ""
            raise ValueError(
                f"scheme: got {given.name}{kept} for a checkpoint of {self.scheme} that keeps {len(self.keep)} layers, "
                f"allowed: {', '.join(BY_CHANNEL)}, with its own keep-list"
            )
        return given.keeping(self.keep)


def preset_of(folder: Path) -> str | None:
    """Whose DiTs a folder of models holds, if they were quantised from a built-in preset."""
    found = (Stored.of(folder / name) for name in MODELS)
    return next((stored.preset for stored in found if stored is not None), None)


def digest(config: DiTConfig) -> str:
    """Of a configuration: the same for equal ones."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def quantised_names(plan: Plan) -> frozenset[str]:
    """The weights that a plan quantises."""
    read = {name for call in plan.loads if call.target == QUANTISE for name in call.reads}
    return frozenset(weight.name for weight in plan.weights if weight.value in read)


class StoredTensors(Mapping[str, Tensor | Quantised]):
    """As `Tensors`, of a quantised checkpoint: each value is read from its file whenever it is asked for."""

    def __init__(self, module: DiT, weights: Weights, device: torch.device | str):
        """Raises ValueError for missing, unexpected or misshapen keys."""
        self._names = {key.removesuffix(SCALE) for key in weights.files if key.endswith(SCALE)}
        scales = {name + SCALE for name in self._names}
        self._tensors = Tensors(module, weights, device, lambda key: None if key in scales else key)
        if extra := sorted(self._names - set(self._tensors)):
            raise ValueError(
                f"checkpoint {weights.source}: has unexpected {extra[0]}{SCALE}, allowed: scales of weights"
            )
        self._shapes, self._files, self._device = weights.shapes(), weights.files, device

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> Tensor | Quantised:
        """Raises ValueError for values that are not finite, and for codes that are of another format."""
        if name not in self._names:
            return self._tensors[name]
        read = Quantised(*(self._tensors.read(key) for key in (name, name + SCALE)))
        what = f"checkpoint {self._files[name]}: {name}"
        check_pair(what, read, self._shapes[name])
        # copies: what is read lies in the mapped file
        pair = Quantised(*(torch.empty_like(x, device=self._device).copy_(x) for x in read))
        if not bool((pair.scales > 0).logical_and(pair.scales.isfinite()).all()):
            raise ValueError(f"{what}: got scales that are not finite or not above 0, allowed: others")
        if bool((pair.codes.view(torch.uint8) & 0x7F == 0x7F).any()):
            raise ValueError(f"{what}: got codes that are not numbers, allowed: finite ones")
        return pair


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into; when all is done it takes its name, and otherwise it is gone. Raises ValueError."""
    check_new(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.mkdir()
        yield draft
        check_new(path)
        draft.rename(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"output: got {str(path)!r} ({error}), allowed: a folder with room for the tensors") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_new(path: Path) -> None:
    """Raises ValueError unless a folder can be made there."""
    if path.exists() or path.is_symlink():
        raise ValueError(f"output: got {str(path)!r}, which exists, allowed: a new folder")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"output: got {str(path)!r}, allowed: a folder where one can be made")


def write(folder: Path, config: DiTConfig, weights: Values, names: Collection[str], stored: Stored) -> int:
    """Write a model into a new folder, with those weights quantised that are named; returns the bytes of its tensors.

    weights: in the dtypes that the model runs with, each asked for once. Raises ValueError for values not finite.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    shards = _shards(DiT(config, torch.bfloat16, "meta"), names)
    weight_map: dict[str, str] = {}
    sums, total = [], 0
    for i, keys in enumerate(shards):
        file = folder / (SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors")
        tensors: dict[str, Tensor] = {}
        for key in keys:
            value = plain(key, weights[key])
            if key in names:
                tensors[key], tensors[key + SCALE] = (x.cpu() for x in quantised(key, value))
            else:
                tensors[key] = value.detach().contiguous().cpu()
        save_file(tensors, file, stored.metadata())
        total += sum(x.nbytes for x in tensors.values())
        weight_map |= dict.fromkeys(tensors, file.name)
        with open(file, "rb") as f:
            sums.append(f"{hashlib.file_digest(f, 'sha256').hexdigest()}  {file.name}\n")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    (folder / MANIFEST).write_text("".join(sums))
    return total


def _shards(model: DiT, names: Collection[str]) -> list[list[str]]:
    """Which values go into which file."""
    shards: list[list[str]] = []
    room = 0
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        size = value.numel() + 4 * value.shape[0] if name in names else value.nbytes
        if not shards or size > room:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= size
    return shards
