"""What an op is, and the one place where all of them are known.

An op's life, in the order of its file: schema, shape rule, reference, kernels, cost. Registered, it is
`torch.ops.horsepower.<name>`: it runs under `torch.export`, on fake tensors, and on a device through the first kernel
that supports the inputs. The reference is plain PyTorch, takes anything the schema allows, and defines what is right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """What an op must do at the least: arithmetic, and bytes read and written once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Kernel:
    """One way to compute an op. `supports` gives the reason against some inputs, or None; `run` fills the outputs."""

    name: str
    supports: Callable[..., str | None]
    run: Callable[..., None]  # (outputs, *inputs)


@dataclass(frozen=True)
class Op:
    """A fused operator. All callables take the inputs in the order of the schema."""

    name: str
    schema: str  # in the language of torch.library, without the name
    outputs: Callable[..., tuple[Tensor, ...]]  # the shape rule: empty outputs for these inputs
    reference: Callable[..., tuple[Tensor, ...]]
    cost: Callable[..., Cost]
    kernels: tuple[Kernel, ...]  # best first

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = self.outputs(*inputs)  # refuses what does not belong together
        for kernel in self.kernels:
            if kernel.supports(*inputs) is None:
                kernel.run(outputs, *inputs)
                return outputs
        return self.reference(*inputs)

    @property
    def single(self) -> bool:
        """Whether torch sees one tensor, not a tuple."""
        return self.schema.endswith("-> Tensor")


OPS: dict[str, Op] = {}
_LIBRARY = torch.library.Library("horsepower", "FRAGMENT")


def register(op: Op) -> Op:
    """Make an op known here and to torch. Raises ValueError if its name is taken."""
    if op.name in OPS:
        raise ValueError(f"name: got {op.name!r}, which is registered already")
    _LIBRARY.define(f"{op.name}{op.schema}")

    def as_torch(rule: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
        return lambda *inputs: rule(*inputs)[0] if op.single else rule(*inputs)

    _LIBRARY.impl(op.name, as_torch(op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"horsepower::{op.name}", as_torch(op.outputs), lib=_LIBRARY)
    OPS[op.name] = op
    return op
