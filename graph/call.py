"""What a plan consists of: calls of operators by name, on values by name."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx

from horsepower.graph.sizes import TensorSpec

Result: TypeAlias = TensorSpec | tuple[TensorSpec, ...] | None  # None: integers


@dataclass(frozen=True)
class Ref:
    """A value made before: an input, a weight or the result of a call."""

    name: str

    @classmethod
    def to(cls, node: fx.Node) -> Any:
        return cls(node.name)

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Call:
    """`result = target(*args)`; afterwards the values in `frees` are needed no more."""

    result: str
    target: str
    args: tuple[Any, ...]  # constants and Refs, in lists and tuples
    kwargs: tuple[tuple[str, Any], ...]
    spec: Result
    views: bool  # the result shares its memory with arguments
    frees: tuple[str, ...]
    module: str  # of the model, where the call comes from

    def __str__(self) -> str:
        operands = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs)]
        made = f"  # {', '.join(map(str, self.makes))}" if self.makes else ""
        return f"%{self.result} = {self.target}({', '.join(operands)}){made}"

    @property
    def reads(self) -> Iterator[str]:
        """The values among its arguments."""
        return refs_in((self.args, [value for _, value in self.kwargs]))

    @property
    def makes(self) -> tuple[TensorSpec, ...]:
        """The tensors that need memory of their own."""
        if self.views or self.spec is None:
            return ()
        return self.spec if isinstance(self.spec, tuple) else (self.spec,)


@dataclass(frozen=True)
class Weight:
    """A value that is a parameter, buffer or constant of the module."""

    value: str
    name: str  # in the module
    spec: TensorSpec


def refs_in(value: Any) -> Iterator[str]:
    """Names of all values in an argument."""
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, list | tuple):
        for part in value:
            yield from refs_in(part)
