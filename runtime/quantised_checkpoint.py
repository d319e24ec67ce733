"""Checkpoints of eight bits: one model in a folder, as published ones are, and what it says of itself in each file.

`W`, of those weights that the scheme quantises, holds codes (F8_E4M3) in the module's shape, `W_scale` their scales
(F32, [rows, 1], or [experts, 1] where a layer has one); all others are as the model runs with them. Metadata, under
`horsepower.quantised`: JSON with the version of this format, scheme, keep-list, budgets, the largest inputs that frozen
scales are made for, which model it is, and a digest of its configuration.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from horsepower.graph.plan import Plan
from horsepower.quant.quantised import Quantised, Values, check_pair, plain, quantised
from horsepower.quant.scheme import STORABLE, Scheme
from horsepower.runtime.checkpoint import INDEX, MANIFEST, SINGLE, Tensors, Weights, read_metadata
from horsepower.runtime.executor import QUANTISERS
from horsepower.runtime.models.dit import DiT, Linear
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
    largest: tuple[tuple[str, float], ...] = ()  # as those of a scheme that is calibrated

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
            keep, largest = tuple(map(str, values["keep"])), tuple(dict(values.get("largest", {})).items())
            found = cls(**values | {"keep": keep, "largest": largest})
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{odd}, allowed: {', '.join(cls.__dataclass_fields__)}") from error
        if found.scheme not in STORABLE:
            raise ValueError(f"checkpoint {file}: got scheme {found.scheme!r}, allowed: {', '.join(STORABLE)}")
        if STORABLE[found.scheme].inputs == "tensor" and not largest:
            raise ValueError(f"checkpoint {file}: got {found.scheme} without largest inputs, allowed: calibrated")
        try:
            found.scheme_for(None)
        except ValueError as error:
            raise ValueError(f"checkpoint {file}: {error}") from error
        return found

    def metadata(self) -> dict[str, str]:
        """As safetensors files carry it."""
        said = {"version": VERSION, **dataclasses.asdict(self), "largest": dict(self.largest)}
        return {"format": "pt", KEY: json.dumps(said)}

    def check(self, model: str, config: DiTConfig) -> "Stored":
        """The checkpoint itself. Raises ValueError if it is another model's."""
        if self.model != model:
            raise ValueError(f"model {model}: got a quantised checkpoint of {self.model}, allowed: one of {model}")
        if self.config != digest(config):
            raise ValueError(f"model {model}: got a quantised checkpoint of another configuration, allowed: its own")
        return self

    def scheme_for(self, given: Scheme | None) -> Scheme:
        """Its own scheme, or another that reads the same codes. Raises ValueError for one that does not."""
        own = replace(STORABLE[self.scheme], keep=self.keep, largest=self.largest)
        if given is None:
            return own
        able = [each.name for each in STORABLE.values() if each.weights == own.weights]
        if given.name not in able or given.keep not in ((), own.keep) or given.largest not in ((), own.largest):
            kept = f" keeping {len(given.keep)} patterns" if given.keep else ""
            scales = " with other largest inputs" if given.largest not in ((), own.largest) else ""
            raise ValueError(
                f"scheme: got {given.name}{kept}{scales} for a checkpoint of {self.scheme} that keeps "
                f"{len(self.keep)} layers, allowed: {', '.join(able)}, as it was quantised"
            )
        return replace(given, keep=own.keep, largest=own.largest)


def preset_of(folder: Path) -> str | None:
    """Whose DiTs a folder of models holds, if they were quantised from a built-in preset."""
    found = (Stored.of(folder / name) for name in MODELS)
    return next((stored.preset for stored in found if stored is not None), None)


def digest(config: DiTConfig) -> str:
    """Of a configuration: the same for equal ones."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def scales_of(plan: Plan) -> dict[str, int]:
    """The weights that a plan quantises, and how many scales each has."""
    made = [call for call in plan.loads if call.target in QUANTISERS]
    counts = {name: int(call.makes[1].shape[0]) for call in made for name in call.reads}
    return {weight.name: counts[weight.value] for weight in plan.weights if weight.value in counts}


class StoredTensors(Mapping[str, Tensor | Quantised]):
    """As `Tensors`, of a quantised checkpoint: each value is read from its file whenever it is asked for."""

    def __init__(self, module: DiT, weights: Weights, stored: Stored, device: torch.device | str):
        """stored: what they say of themselves. Raises ValueError for missing, unexpected or misshapen keys."""
        self._module, self._scheme = module, stored.scheme_for(None)
        self._names = {key.removesuffix(SCALE) for key in weights.files if key.endswith(SCALE)}
        scales = {name + SCALE for name in self._names}
        self._tensors = Tensors(module, weights, device, lambda key: None if key in scales else key)
        if extra := sorted(self._names - set(self._tensors)):
            raise ValueError(
                f"checkpoint {weights.source}: has unexpected {extra[0]}{SCALE}, allowed: scales of weights"
            )
        frozen = {f"{layer}.weight" for layer, _ in stored.largest}
        if self._scheme.inputs == "tensor" and (blind := sorted(self._names - frozen)):
            raise ValueError(f"checkpoint {weights.source}: got {blind[0]} without its largest input, allowed: with it")
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
        check_pair(what, read, self._shapes[name], self._scales(name))
        # copies: what is read lies in the mapped file
        pair = Quantised(*(torch.empty_like(x, device=self._device).copy_(x) for x in read))
        if not bool((pair.scales > 0).logical_and(pair.scales.isfinite()).all()):
            raise ValueError(f"{what}: got scales that are not finite or not above 0, allowed: others")
        if bool((pair.codes.view(torch.uint8) & 0x7F == 0x7F).any()):
            raise ValueError(f"{what}: got codes that are not numbers, allowed: finite ones")
        return pair

    def _scales(self, name: str) -> int:
        if self._scheme.weights == "channel":
            return self._shapes[name][0]
        owner = self._module.get_submodule(name.rpartition(".")[0])
        return owner.experts if isinstance(owner, Linear) else 1


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


def write(folder: Path, config: DiTConfig, weights: Values, scales: Mapping[str, int], stored: Stored) -> int:
    """Write a model into a new folder, its weights quantised with so many `scales`; returns the bytes of its tensors.

    weights: in the dtypes that the model runs with, each asked for once. Raises ValueError for values not finite.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    shards = _shards(DiT(config, torch.bfloat16, "meta"), scales)
    weight_map: dict[str, str] = {}
    sums, total = [], 0
    for i, keys in enumerate(shards):
        file = folder / (SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors")
        tensors: dict[str, Tensor] = {}
        for key in keys:
            value = plain(key, weights[key])
            if key in scales:
                tensors[key], tensors[key + SCALE] = (x.cpu() for x in quantised(key, value, scales[key]))
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


def _shards(model: DiT, scales: Mapping[str, int]) -> list[list[str]]:
    """Which values go into which file."""
    shards: list[list[str]] = []
    room = 0
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        size = value.numel() + 4 * scales[name] if name in scales else value.nbytes
        if not shards or size > room:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= size
    return shards
