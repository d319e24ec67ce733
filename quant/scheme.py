"""Schemes: which products are of eight bits, and which weights stay as they are.

A scheme is said once, to `Engine` or `compile`, and applied by the compiler; `explain` shows what became of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from horsepower.kernels.target import TARGETS

FIELDS = {  # that take one of some values
    "weights": ("channel", "tensor"),
    "inputs": ("token", "tensor", None),
    "recipe": ("current", "block", "delayed", None),
}
HUGE = 2.0**100


@dataclass(frozen=True)
class Scheme:
    """How linear layers are computed. Raises ValueError for a field that says nothing."""

    name: str
    says: str  # in one line
    targets: tuple[str, ...]  # that have the arithmetic for it
    weights: Literal["channel", "tensor"] = "channel"  # what shares a scale: an output of a layer, or the layer
    # The same of inputs, a token or all of them, so that the product is of eight bits; None leaves them as they are.
    inputs: Literal["token", "tensor"] | None = None
    attention: bool = False  # whether queries, keys, values and the weights of these are of eight bits too
    keep: tuple[str, ...] = ()  # patterns (`block.layers.0.*`) of layers, and of attention, that stay as they are
    largest: tuple[tuple[str, float], ...] = ()  # layer, the largest input that its frozen scale holds
    recipe: Literal["current", "block", "delayed"] | None = None  # Transformer Engine's, in the place of a plan

    def __post_init__(self) -> None:
        for name, allowed in FIELDS.items():
            if (given := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}: got {given!r}, allowed: {', '.join(map(str, allowed))}")
        if type(self.attention) is not bool or (self.attention and self.inputs is None):
            raise ValueError(f"attention: got {self.attention!r}, allowed: False, or True with inputs of eight bits")
        for name, values in (("targets", self.targets), ("keep", self.keep), ("largest", self.largest)):
            if not isinstance(values, tuple):
                raise ValueError(f"{name}: got {values!r}, allowed: a tuple")
        if unknown := set(self.targets).difference(TARGETS):
            raise ValueError(f"targets: got {unknown.pop()!r}, allowed: {', '.join(TARGETS)}")
        for layer, value in self.largest:
            if not isinstance(value, int | float) or not 1 / HUGE <= value <= HUGE:  # its inverse is a float32 too
                raise ValueError(f"largest: got {value!r} for {layer}, allowed: a number from 2^-100 to 2^100")

    def keeps(self, layer: str) -> str | None:
        """The pattern under which a layer stays as it is; None if it is quantised. layer: its path in the model."""
        return next((pattern for pattern in self.keep if fnmatchcase(layer, pattern)), None)

    def keeping(self, keep: Sequence[str]) -> "Scheme":
        """The same scheme with another keep-list. Raises ValueError for one pattern in the place of a list."""
        if isinstance(keep, str):
            raise ValueError(f"keep: got {keep!r}, allowed: a list of patterns")
        return replace(self, keep=tuple(keep))

    def calibrated(self, largest: Mapping[str, float]) -> "Scheme":
        """The same scheme with what its layers' inputs were at the most: from now on they saturate there.

        Raises ValueError for what is no number above zero.
        """
        return replace(self, largest=tuple(sorted(largest.items())))

    def check(self, target: str) -> "Scheme":
        """The scheme itself. Raises ValueError if a target has not the arithmetic for it, or it is not calibrated."""
        if target not in self.targets:
            able = ", ".join(scheme.name for scheme in SCHEMES.values() if target in scheme.targets)
            raise ValueError(f"scheme: got {self.name} for {target}, which cannot compute it, allowed: {able}")
        if self.inputs == "tensor" and not self.largest:
            raise ValueError(
                f"scheme: got {self.name} as it is, allowed: calibrated, by `horsepower quantize` or "
                "Scheme.calibrated(largest)"
            )
        return self


FP8 = Scheme(
    "fp8",
    "e4m3 weights by output channel, e4m3 inputs by token, quantised by the kernel that makes them",
    targets=("sm_90",),
    inputs="token",
)
FP8_ATTENTION = replace(
    FP8, name="fp8-attention", says="fp8, and e4m3 queries, keys, values and weights of these", attention=True
)
FP8_TENSOR = Scheme(
    "fp8-tensor",
    "e4m3 weights and inputs with a scale a tensor, calibrated and frozen; the library's products",
    targets=("sm_90",),
    weights="tensor",
    inputs="tensor",
)
FP8_WEIGHTS = Scheme("fp8-weights", "e4m3 weights by output channel, 16-bit products", targets=TARGETS)
TE = Scheme(
    "te",
    "Transformer Engine's linear layers in the model as it is written, scales from each tensor as it comes",
    targets=("sm_90",),
    recipe="current",
)
TE_BLOCK = replace(
    TE, name="te-block", says="Transformer Engine's linear layers, a scale a block of 128", recipe="block"
)
TE_DELAYED = replace(
    TE, name="te-delayed", says="Transformer Engine's linear layers, scales learned by calibration", recipe="delayed"
)
ALL = (FP8, FP8_ATTENTION, FP8_TENSOR, FP8_WEIGHTS, TE, TE_BLOCK, TE_DELAYED)
SCHEMES = {scheme.name: scheme for scheme in ALL}
STORABLE = {scheme.name: scheme for scheme in ALL if scheme.recipe is None}  # a checkpoint can hold their codes


def scheme_of(given: "str | Scheme | None") -> Scheme | None:
    """A scheme by its name. Raises ValueError for one that there is not."""
    if given is None or isinstance(given, Scheme):
        return given
    if not isinstance(given, str) or given not in SCHEMES:
        raise ValueError(f"scheme: got {given!r}, allowed: {', '.join(SCHEMES)}")
    return SCHEMES[given]
