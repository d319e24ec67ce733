"""The DiT behind the compiler: `condition` as it is, `velocity` as one fused plan for all lengths."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from horsepower.graph import passes
from horsepower.graph.plan import Plan
from horsepower.quant.quantised import Values
from horsepower.quant.scheme import Scheme
from horsepower.runtime.checkpoint import fill
from horsepower.runtime.compiled import Compiled, compile, planned
from horsepower.runtime.models.dit import Condition, Counts, DiT
from horsepower.runtime.models.dit_config import DiTConfig

_ANY = torch.export.Dim.DYNAMIC
_ROWS = {0: _ANY}
CONDITIONER = ("adapter.text_embedder", "adapter.rope")  # what `condition` reads


def expected_fusions(config: DiTConfig) -> dict[str, int]:
    """Sites that each pass must take: every half of every layer, and every norm that follows a sum."""
    layers = config.num_layers
    return {
        "fuse_qkv": layers,
        "fuse_gate": 0 if config.gating == "none" else layers,
        "fuse_activation": layers,
        "fuse_add_norm": 2 * layers - 1,  # the last sum is split into video and audio before it is normed
    }


# As `torch.export` takes them: counts and frames are dynamic.
VELOCITY_SHAPES = (_ROWS, _ROWS, Condition(_ROWS, _ROWS), _ANY)  # type: ignore[arg-type]


def velocity_example(model: DiT, counts: Counts = (6, 5, 4), frames: int = 3) -> tuple[Tensor, Tensor, Condition, int]:
    """Arguments of `model.velocity` without values, on its device; to trace with, any distinct counts will do."""
    config, device = model.config, model.final_linear_video.weight.device
    master = model.final_linear_video.weight.dtype
    condition = Condition(
        torch.empty(counts[2], config.hidden_size, dtype=config.params_dtype, device=device),
        torch.empty(sum(counts), 6 * (config.head_dim // 8), dtype=master, device=device),
    )
    video, audio = (
        torch.empty(count, channels, dtype=master, device=device)
        for count, channels in zip(counts, (config.video_in_channels, config.audio_in_channels), strict=False)
    )
    return video, audio, condition, frames


def compile_velocity(
    model: DiT,
    only: Sequence[passes.Pass] = passes.PASSES,
    expect: Mapping[str, int] | None = None,
    cache: bool = True,
    device: torch.device | None = None,
    weights: Values | None = None,
    scheme: str | Scheme | None = None,
) -> Compiled:
    """`model.velocity` as one plan for all lengths; the arguments are those of `compile`."""
    inputs = velocity_example(model), None, VELOCITY_SHAPES
    return compile(model, *inputs, expect, "velocity", only, cache, device=device, weights=weights, scheme=scheme)


def plan_velocity(
    model: DiT,
    device: torch.device,
    strict: bool = True,
    only: Sequence[passes.Pass] = passes.PASSES,
    cache: bool = True,
    scheme: str | Scheme | None = None,
    target: str | None = None,
) -> Plan:
    """The plan alone, on a device, which states what it will need; the model may be on the meta device.

    target: another than the device's, for a plan to look at.
    Raises ValueError, if `strict`, for a fusion that the model family expects and that does not happen.
    """
    example, expect = velocity_example(model), expected_fusions(model.config) if strict else None
    where = (only, cache, target, device, scheme)
    return planned(model, example, None, VELOCITY_SHAPES, expect, "velocity", *where)[0]


def velocity_sizes(counts: Counts, frames: int) -> dict[str, int]:
    """As `Plan.at` takes them, for the plan of a velocity."""
    return dict(zip(("video_0", "audio_0", "condition_text_0", "frames"), (*counts, frames), strict=True))


class FusedDiT:
    """Stands where a DiT stands in the pipeline. Compiling takes seconds, once; new lengths do not compile again."""

    def __init__(
        self,
        model: DiT,
        strict: bool = True,
        plan: Plan | None = None,
        weights: Values | None = None,
        scheme: str | Scheme | None = None,
    ):
        """`model` with its weights, perhaps under a scheme; or on the meta device, with its `plan` and its `weights`.

        Such weights are streamed to the plan's device: beside the finished ones one or two are there at a time.
        Raises ValueError, unless `strict` is False, if a fusion that the model family expects does not happen.
        """
        if plan is None or weights is None:
            self._conditioner = model
            expect = expected_fusions(model.config) if strict else None
            self.compiled = compile_velocity(model, expect=expect, scheme=scheme)
        else:
            self._conditioner = conditioner(model, weights, plan.device)
            self.compiled = Compiled(model, plan, True, 0.0, weights)
        self.condition = self._conditioner.condition

    def velocity(self, video: Tensor, audio: Tensor, condition: Condition, frames: int) -> tuple[Tensor, Tensor]:
        """As `DiT.velocity`."""
        result: tuple[Tensor, Tensor] = self.compiled(video, audio, condition, frames)
        return result

    @property
    def arena_bytes(self) -> int:
        """As that of `Compiled`."""
        return self.compiled.arena_bytes

    def drop_arenas(self) -> None:
        """As `Compiled.drop_arenas`."""
        self.compiled.drop_arenas()

    def to(self, device: torch.device) -> "FusedDiT":
        """Bring all weights of a model that was made of a plan to a device, without its recipes; drop its arenas."""
        self.compiled.to(device)
        for part in CONDITIONER:
            self._conditioner.get_submodule(part).to(device)
        return self


def conditioner(model: DiT, weights: Values, device: torch.device | str) -> DiT:
    """A twin of a model on the meta device that has what `condition` reads, and nothing else."""
    twin = copy.deepcopy(model)  # of the meta device: nothing is copied
    for part in CONDITIONER:
        fill(twin.get_submodule(part), weights, device, f"{part}.")
    return twin
