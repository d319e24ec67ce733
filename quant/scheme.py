"""Schemes: which products are of eight bits, and which weights stay as they are.

A scheme is said once, to `Engine` or `compile`, and applied by the compiler; `explain` shows what became of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from horsepower.kernels.target import TARGETS


@dataclass(frozen=True)
class Scheme:
    """How linear layers are computed."""

    name: str
    says: str  # in one line
    activations: bool  # in eight bits too, so that the products are; else weights are stored in eight bits
    targets: tuple[str, ...]  # that have the arithmetic for it
    keep: tuple[str, ...] = ()  # patterns (`block.layers.0.*`) of layers that stay as they are

    def keeps(self, layer: str) -> str | None:
        """The pattern under which a layer stays as it is; None if it is quantised. layer: its path in the model."""
        return next((pattern for pattern in self.keep if fnmatchcase(layer, pattern)), None)

    def keeping(self, keep: Sequence[str]) -> "Scheme":
        """The same scheme with another keep-list."""
        return replace(self, keep=tuple(keep))

    def check(self, target: str) -> "Scheme":
        """The scheme itself. Raises ValueError if a target has not the arithmetic for it."""
        if target not in self.targets:
            able = ", ".join(scheme.name for scheme in SCHEMES.values() if target in scheme.targets)
            raise ValueError(f"scheme: got {self.name} for {target}, which cannot compute it, allowed: {able}")
        return self


FP8 = Scheme(
    "fp8",
    "e4m3 weights by output channel, e4m3 activations by token, quantised by the kernel that makes them",
    activations=True,
    targets=("sm_90",),
)
FP8_WEIGHTS = Scheme(
    "fp8-weights", "e4m3 weights by output channel, 16-bit products", activations=False, targets=TARGETS
)
SCHEMES = {scheme.name: scheme for scheme in (FP8, FP8_WEIGHTS)}


def scheme_of(given: "str | Scheme | None") -> Scheme | None:
    """A scheme by its name. Raises ValueError for one that there is not."""
    if given is None or isinstance(given, Scheme):
        return given
    if given not in SCHEMES:
        raise ValueError(f"scheme: got {given!r}, allowed: {', '.join(SCHEMES)}")
    return SCHEMES[given]
