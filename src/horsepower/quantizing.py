"""`horsepower quantize`: what eight bits cost, layer by layer and end to end; a checkpoint of what holds the budget."""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from horsepower.bench.clips import PROMPTS, Clips, distance
from horsepower.bench.measure import machine
from horsepower.bench.plot import Line, lines
from horsepower.bench.report import Cell, Figure, Paragraph, Part, Report, Table
from horsepower.graph.passes import PASSES
from horsepower.graph.passes.lower import lower
from horsepower.graph.plan import Plan
from horsepower.kernels.target import target_of
from horsepower.quant.budget import BUDGET, LATENT_BUDGET, ProductError, fewest
from horsepower.quant.scheme import STORABLE, Scheme
from horsepower.runtime import memory
from horsepower.runtime.asked import checked_device
from horsepower.runtime.calibration import MARGIN, ROWS, Calibration, calibrated, largest_inputs
from horsepower.runtime.devices import free_bytes
from horsepower.runtime.fused import FusedDiT, plan_velocity
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit_config import DiTConfig
from horsepower.runtime.pipeline import Latents
from horsepower.runtime.presets import ModelName
from horsepower.runtime.quantised_checkpoint import Stored, check_new, digest, new_folder, scales_of, write
from horsepower.runtime.source import Source, eager_dit, open_source

Say = Callable[[str], None]
SMALL, REAL = ((192, 128), 1), ((448, 256), 5)  # pixels and seconds: of the preset's clips, of released models'
KINDS = {
    "linear_qkv": "qkv",
    "attention": "attention",
    "linear_proj": "proj",
    "up_gate_proj": "up",
    "down_proj": "down",
}


@dataclass(frozen=True)
class Options:
    """What to measure, and where to write what holds it."""

    scheme: str = "fp8"
    variants: tuple[str, ...] = ()  # none: every model that is there; of the preset distill
    prompts: tuple[str, ...] = PROMPTS
    budget: float = BUDGET  # relative L2 of a layer's output
    latent_budget: float = LATENT_BUDGET  # relative L2 of the final latents
    output: Path | None = None  # a new folder

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be."""
        if self.scheme not in STORABLE:
            raise ValueError(f"scheme: got {self.scheme!r}, allowed: {', '.join(STORABLE)}")
        for name in ("budget", "latent_budget"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise ValueError(f"{name}: got {value}, allowed: a number above 0")
        if not self.prompts:
            raise ValueError("calibrate: got no prompts, allowed: a file with one a line")
        if self.output is not None:
            check_new(self.output)


@dataclass(frozen=True)
class Measured:
    """One model under a scheme."""

    name: ModelName
    config: DiTConfig
    errors: Mapping[str, ProductError]  # by layer, the largest of all steps and prompts
    kept: Mapping[str, str]  # layers that are not quantised, and why
    latents: Mapping[str, tuple[float, float]]  # relative L2 of video and audio, by what is compared
    holds: bool  # whether the latent budget does
    scheme: Scheme  # with what it was calibrated to
    scales: Mapping[str, int]  # weights that are quantised, and how many scales each has
    bytes: tuple[int, int]  # of all weights: in 16 bits, and as they are written


def quantise(
    preset: str | None, folder: str | None, options: Options, device: str, say: Say
) -> tuple[bool, Report, Report]:
    """Whether budgets hold, and the report in short and in full; of a built-in preset or of a released folder.

    Layers over `budget` stay in 16 bits; if the final latents are over `latent_budget`, so do the worst of the others,
    as few as are needed. Written, if all models hold, is a folder that `Engine.from_pretrained` opens.
    Raises ValueError for what is missing or wrong.
    """
    chosen, where = checked_device(device), preset or str(folder)
    source = open_source(where, chosen, torch.bfloat16)
    names = _variants(source, options.variants or (("distill",) if preset else ()))
    measured = [_Measurement(source, where, name, options, chosen, say).run() for name in names]
    holds = all(each.holds for each in measured)
    if options.output is not None and holds:
        say(f"writing {options.output}")
        with new_folder(options.output) as draft:
            for each in measured:
                _write(draft, source, each, options, preset)
            for part in Path(folder).iterdir() if folder else ():
                if part.name not in names:  # what is not quantised is where it was
                    (draft / part.name).symlink_to(part.resolve())
    return holds, _report(where, measured, options, chosen), _report(where, measured, options, chosen, full=True)


def _variants(source: Source, asked: Sequence[str]) -> list[ModelName]:
    there = source.models()
    if wrong := [name for name in asked if name not in there]:
        raise ValueError(f"variant: got {wrong[0]!r}, allowed: {', '.join(there)}")
    names = [name for name in there if not asked or name in asked]
    for name in names:
        if source.stored(name) is not None:
            raise ValueError(f"variant: got {name}, which is quantised already, allowed: a model of 16 bits or more")
        if name.endswith("_sr") and not {"base", "distill"} & set(there):
            raise ValueError(f"variant: got {name} alone, allowed: with base or distill, which it begins from")
    return names


class _Measurement:
    """Of one model: layer by layer beside a run in 16 bits, then end to end."""

    def __init__(
        self, source: Source, where: str, name: ModelName, options: Options, device: torch.device, say: Say
    ):  # fmt: skip
        self._source, self._where, self._name, self._device, self._say = source, where, name, device, say
        self._options, self._scheme = options, STORABLE[options.scheme]
        self._model = DiT(source.config(name), torch.bfloat16, "meta").eval()
        self._clips = Clips(source, name, device, *(SMALL if where == "foal" else REAL), options.prompts)
        self._tried: dict[int, tuple[float, float]] = {}

    def run(self) -> Measured:
        plain, errors = self._layers()
        budget = self._options.budget
        kept = {layer: f"over {budget:g}" for layer, error in errors.items() if error.scheme > budget}
        latents = {}
        if (exact := self._exact()) is not None:
            latents["bf16 against float32"] = distance(plain, exact)
        others = sorted((layer for layer in errors if layer not in kept), key=lambda layer: -errors[layer].scheme)

        def holds(n: int) -> bool:
            self._tried[n] = self._end_to_end([*kept, *others[:n]], plain)
            return max(self._tried[n]) <= self._options.latent_budget

        count = fewest(len(others), holds)
        more = others[:count]
        latents[f"{self._scheme.name} against bf16"] = self._tried[len(more)]
        if more:
            latents[f"{self._scheme.name} before more were kept"] = self._tried[0]
        kept |= dict.fromkeys(more, f"latents over {self._options.latent_budget:g}")
        plan = plan_under(self._model, self._scheme.keeping([*kept]), self._device)
        scales = scales_of(plan)
        able = {weight.removesuffix(".weight") for weight in scales}
        able |= {site.module for site in plan.sites if site.rewrite == "quantise_attention" and not site.refused}
        kept |= dict.fromkeys((layer for layer in errors if layer not in {*kept, *able}), "refused by the compiler")
        found = (errors, kept, latents, count is not None, self._scheme, scales, self._bytes(scales))
        return Measured(self._name, self._model.config, *found)

    def _layers(self) -> tuple[list[Latents], dict[str, ProductError]]:
        """Final latents in 16 bits, and the largest error of each layer on the way."""
        if self._name.endswith("_sr"):
            first: ModelName = "distill" if "distill" in self._source.models() else "base"
            self._say(f"{self._name}: what {first} makes")
            self._clips.begin(first, eager_dit(self._source, first, self._device, torch.bfloat16))
        self._say(f"{self._name}: each layer, in {self._clips.stage.steps} steps of {len(self._clips.prompts)} clips")
        model = eager_dit(self._source, self._name, self._device, torch.bfloat16)
        if self._scheme.inputs == "tensor":
            with largest_inputs(model) as largest:
                self._clips.run(model)
            self._scheme = calibrated(self._scheme, largest)
        calibration = Calibration(model, self._scheme)
        with calibration.watching():
            plain = self._clips.run(model)
        return plain, {
            layer: ProductError(max(each.own for each in found), max(each.scheme for each in found))
            for layer, found in calibration.errors.items()
        }

    def _exact(self) -> list[Latents] | None:
        """Final latents in float32; None if they do not fit."""
        config, grid = self._model.config, self._clips.grid
        needed = memory.weight_bytes(config, torch.float32) + 2 * memory.activation_bytes(config, grid)
        gc.collect()  # models refer to themselves
        if needed > free_bytes(self._device):
            return None
        self._say(f"{self._name}: end to end in float32")
        source = open_source(self._where, self._device, torch.float32)
        return self._clips.run(eager_dit(source, self._name, self._device, torch.float32))

    def _end_to_end(self, keep: Sequence[str], plain: Sequence[Latents]) -> tuple[float, float]:
        """How far final latents are from those in 16 bits."""
        gc.collect()
        self._say(f"{self._name}: end to end, keeping {len(keep)} layers")
        plan = plan_under(self._model, self._scheme.keeping(keep), self._device)
        weights = self._source.weights(self._name)
        return distance(self._clips.run(FusedDiT(self._model, plan=plan, weights=weights)), plain)

    def _bytes(self, scales: Mapping[str, int]) -> tuple[int, int]:
        """Of the weights in 16 bits, and as they are written."""
        values = (*self._model.named_parameters(), *self._model.named_buffers())
        saved = sum(x.nbytes - x.numel() - 4 * scales[name] for name, x in values if name in scales)
        before = sum(x.nbytes for _, x in values)
        return before, before - saved


def plan_under(model: DiT, scheme: Scheme, device: torch.device) -> Plan:
    """A plan of `velocity` under a scheme; one that the device cannot compute as another's, by the plain operators."""
    if target_of(device) in scheme.targets:
        return plan_velocity(model, device, scheme=scheme)
    only = [each for each in PASSES if each is not lower]
    return plan_velocity(model, device, only=only, scheme=scheme, target=scheme.targets[0])


def _write(draft: Path, source: Source, found: Measured, options: Options, preset: str | None) -> None:
    budgets = options.budget, options.latent_budget
    largest = tuple((layer, x) for layer, x in found.scheme.largest if layer not in found.kept)
    said = Stored(found.name, digest(found.config), options.scheme, (*found.kept,), *budgets, preset, largest)
    write(draft / found.name, found.config, source.weights(found.name), found.scales, said)


def read_prompts(path: str) -> tuple[str, ...]:
    """One a line. Raises ValueError for a file that cannot be read."""
    try:
        lines_read = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"calibrate: got {error}, allowed: a text file with one prompt a line") from error
    return tuple(line.strip() for line in lines_read if line.strip())


def _report(
    where: str, measured: Sequence[Measured], options: Options, device: torch.device, full: bool = False
) -> Report:  # fmt: skip
    scheme, count = STORABLE[options.scheme], len(options.prompts)
    parts: list[Part] = []
    for each in measured:
        parts += _parts(each, options, full)
    (width, height), seconds = SMALL if where == "foal" else REAL
    parts.append(
        Paragraph(
            f"Layers: relative L2 of a product against float64, the largest of all steps of {count} clips of {seconds} "
            f"s at {width}x{height}; up to {ROWS} rows a step, the edges of modalities among them. Latents: relative "
            "L2 of what the last step leaves, the worst clip."
        )
    )
    if scheme.inputs == "tensor":
        parts.append(
            Paragraph(
                f"Scales of inputs: frozen, for {MARGIN:g} times the largest value of all rows of all steps; what is "
                "larger saturates."
            )
        )
    if target_of(device) not in scheme.targets:
        parts.append(Paragraph(f"{device} cannot compute {scheme.name}: plain operators stood for its kernels."))
    return Report(f"{where}: {scheme.name}, {scheme.says}", machine(str(device)), tuple(parts))


def _parts(found: Measured, options: Options, full: bool) -> list[Part]:
    blocks = _blocks(found.config)
    quantised, (before, after) = len(found.errors) - len(found.kept), found.bytes
    what = "linear layers and attentions" if found.scheme.attention else "linear layers"
    over = f" The latent budget of {options.latent_budget:g} CANNOT be held: nothing is written."
    parts: list[Part] = [
        Paragraph(
            f"{found.name}: {quantised} of {len(found.errors)} {what} in eight bits; weights take "
            f"{after / 1e9:.3g} GB instead of {before / 1e9:.3g} in bf16.{'' if found.holds else over}"
        ),
        Table(f"{found.name}: layers by kind", KIND_COLUMNS, tuple(_kinds(found, blocks))),
    ]
    if found.kept:
        rows = tuple((layer, *_cells(found.errors[layer]), why) for layer, why in found.kept.items())
        parts.append(Table(f"{found.name}: layers that stay in bf16", ("layer", "bf16", options.scheme, "why"), rows))
    latents = tuple((what, *error) for what, error in found.latents.items())
    parts.append(Table(f"{found.name}: final latents", ("", "video", "audio"), latents))
    drawn = [
        Line(kind, [_finite(found.errors[layer].scheme) for layer in found.errors if layer.endswith(leaf)])
        for leaf, kind in KINDS.items()
        if leaf != "attention" or found.scheme.attention
    ]
    title = f"{found.name}: error of each layer under {options.scheme}; dashed: its budget"
    parts.append(Figure(title, lines(title, drawn, options.budget, "layer")))
    if full:
        largest = dict(found.scheme.largest)
        every = tuple(
            (layer, *_cells(e), *([largest[layer]] if largest else []), found.kept.get(layer))
            for layer, e in found.errors.items()
        )
        columns = ("layer", "bf16", options.scheme, *(["inputs up to"] if largest else []), "kept")
        parts.append(Table(f"{found.name}: every layer", columns, every))
    return parts


KIND_COLUMNS = ("kind", "blocks", "layers", "bf16", "median", "worst", "worst layer", "kept")


def _kinds(found: Measured, blocks: Mapping[int, str]) -> list[tuple[Cell, ...]]:
    """A row for each kind of product in each run of equal blocks."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in found.errors:
        _, _, block, *_, leaf = layer.split(".")
        groups.setdefault((KINDS[leaf], blocks[int(block)]), []).append(layer)
    rows: list[tuple[Cell, ...]] = []
    for (kind, where), layers in groups.items():
        worst = max(layers, key=lambda layer: found.errors[layer].scheme)
        errors = [found.errors[layer] for layer in layers]
        own, middle = max(e.own for e in errors), median(e.scheme for e in errors)
        kept = sum(layer in found.kept for layer in layers)
        rows.append((kind, where, len(layers), *map(_finite, (own, middle, found.errors[worst].scheme)), worst, kept))
    return rows


def _blocks(config: DiTConfig) -> dict[int, str]:
    """The run of equal blocks that each is in, such as 4-35."""
    lists = (config.mm_layers, config.gelu7_layers, config.post_norm_layers)
    kinds = [tuple(i in each for each in lists) for i in range(config.num_layers)]
    starts = [i for i in range(len(kinds)) if not i or kinds[i] != kinds[i - 1]]
    found: dict[int, str] = {}
    for first, end in zip(starts, [*starts[1:], len(kinds)], strict=True):
        found |= dict.fromkeys(range(first, end), f"{first}-{end - 1}")
    return found


def _cells(error: ProductError) -> tuple[float | None, float | None]:
    return _finite(error.own), _finite(error.scheme)


def _finite(error: float) -> float | None:
    """JSON has no infinity."""
    return error if math.isfinite(error) else None
