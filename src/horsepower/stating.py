"""`horsepower memory`: what a request takes on a GPU, phase by phase, before anything is loaded; needs no GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from horsepower.bench.measure import machine
from horsepower.bench.report import Cell, Paragraph, Report, Table
from horsepower.kernels.target import GPUS
from horsepower.quant.scheme import Scheme
from horsepower.runtime.fused import plan_velocity
from horsepower.runtime.memory import DiTBytes, planned_bytes
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.phases import PartSizes, phases_of
from horsepower.runtime.presets import MODELS, ModelName, sizes
from horsepower.runtime.quantised_checkpoint import Stored
from horsepower.runtime.released import ReleasedFolder, ReleasedSizes
from horsepower.runtime.request import Request
from horsepower.runtime.tokens import Grid
from horsepower.runtime.turns import GB, MemoryStatement, Part, Phase, state

DTYPE = torch.bfloat16
ROOM = 2**60  # of a host that holds whatever waits
NOTE = (
    "GB are 10^9 bytes. Weights are exact: a diffusion transformer's are those of its plan, after its recipes, the "
    "others' those of their modules. Its arena and activations are the plan's own, for the longest prompt; beside them "
    "a stage's latents. Activations of encoders and decoders are bounds. Not in it: the CUDA context, the "
    "libraries' scratch memory, and what the allocator leaves between tensors."
)


@dataclass(frozen=True)
class Options:
    """What is stated: a request to a model on a GPU of a target. Raises ValueError.

    folder: of released checkpoints, of which sizes alone are read; None takes what is published. scheme: of the
    diffusion transformers; what it leaves has bfloat16 weights.
    """

    request: Request
    target: str = "sm_90"
    model: ModelName = "distill"
    folder: str | None = None
    scheme: Scheme | None = None

    def __post_init__(self) -> None:
        if self.target not in GPUS:
            raise ValueError(f"target: got {self.target!r}, allowed: {', '.join(GPUS)}")
        if self.model not in ("distill", "base"):
            raise ValueError(f"model: got {self.model!r}, allowed: distill, base")
        if self.scheme is not None:
            self.scheme.check(self.target)
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ValueError(f"folder: got {self.folder!r}, allowed: a folder of checkpoints")


def parts_of(options: Options) -> tuple[dict[str, Part], tuple[Phase, ...]]:
    """The parts that the request needs, and its phases, as `state` takes them; nothing is there yet."""
    source, picture = _source(options), sizes(options.request.resolution)

    def dit(name: ModelName, grid: Grid, passes: int) -> DiTBytes:
        model = DiT(source.config(name), DTYPE, "meta").eval()
        stored = Stored.of(Path(options.folder) / name) if options.folder else None
        scheme = stored.scheme_for(options.scheme) if stored else options.scheme
        plan = plan_velocity(model, torch.device("meta"), scheme=scheme, target=options.target)
        return planned_bytes(model, plan, grid, passes)

    return phases_of(options.request, options.model, picture, source, dit)


def stated(options: Options, device_memory: int | None = None) -> Report:
    """The report; device_memory: bytes of the GPU, None: the least that will do by turns.

    Raises ValueError for what is not there, and with the bytes that are missing if not even turns fit.
    """
    request, scheme, needed = options.request, options.scheme, parts_of(options)
    made, wide = (state(*needed, budget, ROOM) for budget in (device_memory, ROOM))
    width, height = sizes(request.resolution).final
    where = ", ".join((options.folder or "as released", *([scheme.name] if scheme else [])))
    title = f"Memory of a clip of {request.duration:g} s at {width}x{height} on {options.target}, {where}"
    asked = "the least that will do" if device_memory is None else "as asked for"
    says = (
        f"Peak {made.peak / GB:.1f} GB in {made.fullest.phase}, within {made.budget / GB:.1f} GB, {asked}; "
        f"{made.host_peak / GB:.1f} GB wait on the host. {_alternating(made)} "
        f"Side by side all parts take {wide.peak / GB:.1f} GB; no less than {made.least / GB:.1f} GB will do."
    )
    price = [Paragraph(_price(options, needed[0]))] if scheme is not None and scheme.keep else []
    return Report(title, machine(), (Paragraph(says), *price, _phases(made)))


def _price(options: Options, parts: Mapping[str, Part]) -> str:
    """What the keep-list of a scheme costs."""
    assert options.scheme is not None
    empty, _ = parts_of(replace(options, scheme=options.scheme.keeping(())))
    name, *_ = (name for name in parts if name in MODELS)
    kept, least = parts[name].bytes / GB, empty[name].bytes / GB
    return f"Weights of {name}: {kept:.2f} GB; {least:.2f} GB if nothing were kept as {', '.join(options.scheme.keep)}."


def _alternating(made: MemoryStatement) -> str:
    return f"In turns: {', '.join(made.alternating)}." if made.alternating else "All parts stay once they are loaded."


def _phases(made: MemoryStatement) -> Table:
    names = list(dict.fromkeys(name for turn in made.turns for name in turn.device))
    rows: list[tuple[Cell, ...]] = []
    for turn in made.turns:
        parts = (turn.device[name] / GB if name in turn.device else None for name in names)
        beside = max((turn.loading, *turn.activations.values())) / GB
        rows.append((turn.phase, turn.peak / GB, *parts, beside, sum(turn.host.values()) / GB))
    return Table("GB in each phase", ("phase", "sum", *names, "activations", "on the host"), tuple(rows), NOTE)


def _source(options: Options) -> PartSizes:
    if options.folder is None:
        return ReleasedSizes(DTYPE)
    source = ReleasedFolder(Path(options.folder), torch.device("cpu"), DTYPE)
    for name in (options.model, sizes(options.request.resolution).super_resolution):
        if name is not None and name not in source.models():
            raise ValueError(f"model: got {name!r}, allowed: {', '.join(source.models()) or 'none'} with these files")
    return source
