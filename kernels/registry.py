"""What an op is, and the one place where all of them are known.

An op's life, in the order of its file: schema, shape rule, reference, kernels, cost. Registered, it is
`torch.ops.horsepower.<name>`: it runs under `torch.export`, on fake tensors, and on a device through the first kernel
that supports the inputs. The reference is plain PyTorch, takes anything the schema allows, and defines what is right.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from horsepower.kernels import tables

Write = Callable[..., None]  # (outputs, workspace, *inputs)


@dataclass(frozen=True)
class Cost:
    """What an op must do at the least: arithmetic, and bytes read and written once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Kernel:
    """One way to compute an op. `supports` gives the reason against some inputs, or None; `run` fills the outputs.

    `workspace` gives the bytes of scratch memory from the tensors' sizes and dtypes alone, so that inputs of the
    largest shapes, on any device, tell what to set aside. `run` gets them as a uint8 tensor at a multiple of 64 bytes;
    None without.
    """

    name: str
    supports: Callable[..., str | None]
    run: Write
    workspace: Callable[..., int] | None = None
    devices: tuple[str, ...] = ("cpu",)  # types of those that it runs on
    rereads: Callable[..., int] | None = None  # bytes that pass memory once more, in a second launch


@dataclass(frozen=True)
class Op:
    """A fused operator. All callables take the inputs in the order of the schema."""

    name: str
    schema: str  # in the language of torch.library, without the name
    outputs: Callable[..., tuple[Tensor, ...]]  # the shape rule: empty outputs for these inputs
    reference: Callable[..., tuple[Tensor, ...]]
    cost: Callable[..., Cost]
    kernels: tuple[Kernel, ...] = ()  # best first, as it is predicted
    expand: Callable[..., tuple[Any, ...]] | None = None  # (call, *inputs): the same in calls of other ops

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = self.outputs(*inputs)  # refuses what does not belong together
        kernel = self.kernel(*inputs)
        if kernel is None:
            return self.reference(*inputs)
        size = 0 if kernel.workspace is None else kernel.workspace(*inputs)
        # torch's CPU allocator aligns to 64 bytes, its CUDA allocator to 512
        kernel.run(outputs, outputs[0].new_empty(size, dtype=torch.uint8) if size else None, *inputs)
        return outputs

    def kernel(self, *inputs: Any) -> Kernel | None:
        """The best kernel for these inputs; None if the reference has to do."""
        return next((kernel for kernel in tables.ranked(self, inputs) if kernel.supports(*inputs) is None), None)

    def workspace(self, devices: Collection[str], *inputs: Any) -> int:
        """Bytes of scratch memory that suffice for these sizes and dtypes, whatever kernel of these devices runs."""
        kernels = (kernel for kernel in self.kernels if not set(devices).isdisjoint(kernel.devices))
        return max((kernel.workspace(*inputs) for kernel in kernels if kernel.workspace is not None), default=0)

    def writer(self, *inputs: Any) -> Write:
        """How results for inputs like these are written into memory that is given."""
        kernel = self.kernel(*inputs)
        return self._write_reference if kernel is None else kernel.run

    def write(self, outputs: tuple[Tensor, ...], workspace: Tensor | None, *inputs: Any) -> None:
        """Write the results into the outputs, with `workspace(...)` bytes of scratch memory."""
        self.writer(*inputs)(outputs, workspace, *inputs)

    def _write_reference(self, outputs: tuple[Tensor, ...], _workspace: Tensor | None, *inputs: Any) -> None:
        for output, result in zip(outputs, self.reference(*inputs), strict=True):
            output.copy_(result)

    @property
    def single(self) -> bool:
        """Whether torch sees one tensor, not a tuple."""
        return self.schema.endswith("-> Tensor")

    def single_result(self, *inputs: Any) -> Tensor:
        """Call an op that has one result, as torch gives it."""
        return self(*inputs)[0]


def parts_of(expand: Callable[..., tuple[Any, ...]], inputs: Sequence[Any]) -> list[tuple[Op, tuple[Any, ...]]]:
    """The ops that an expansion calls, each with its arguments, for inputs on the meta device."""
    found: list[tuple[Op, tuple[Any, ...]]] = []

    def call(target: Any, *arguments: Any) -> Any:
        if op := op_of(str(target)):
            found.append((op, arguments))
        return target(*arguments)

    expand(call, *inputs)
    return found


def fused(
    name: str, schema: str, outputs: Callable[..., tuple[Tensor, ...]], expand: Callable[..., tuple[Any, ...]],
    kernels: tuple[Kernel, ...] = (),
) -> Op:  # fmt: skip
    """An op that is made of others: where no kernel does all of it at once, it runs, and is lowered, as its parts.

    Its cost is that of such a kernel: nothing between the parts passes memory, but for what a second launch rereads.
    """

    def reference(*inputs: Any) -> tuple[Tensor, ...]:
        return expand(lambda target, *arguments: target(*arguments), *inputs)

    def cost(*inputs: Any) -> Cost:
        inputs = tuple(x.to("meta") if isinstance(x, Tensor) else x for x in inputs)
        flops = sum(op.cost(*arguments).flops for op, arguments in parts_of(expand, inputs))
        given, made = [x for x in inputs if isinstance(x, Tensor)], outputs(*inputs)
        moved = sum(x.numel() * x.itemsize for x in (*given, *made))
        second = max((kernel.rereads(*inputs) for kernel in kernels if kernel.rereads), default=0)
        counted = sum(x.numel() * x.itemsize for x in made[1:])  # what the second launch writes
        return Cost(flops, moved + max(0, second - counted))

    return Op(name, schema, outputs, reference, cost, kernels, expand)


OPS: dict[str, Op] = {}
_LIBRARY = torch.library.Library("horsepower", "FRAGMENT")


def op_of(target: str) -> Op | None:
    """The op behind the name of a torch operator, such as horsepower.linear.default; None if it is none of ours."""
    namespace, _, name = target.partition(".")
    return OPS.get(name.removesuffix(".default")) if namespace == "horsepower" else None


def register(op: Op) -> Op:
    """Make an op known here and to torch. Raises ValueError if its name is taken."""
    if op.name in OPS:
        raise ValueError(f"name: got {op.name!r}, which is registered already")
    _LIBRARY.define(f"{op.name}{op.schema}")

    def shape_rule(*inputs: Any) -> Any:
        return op.outputs(*inputs)[0] if op.single else op.outputs(*inputs)

    _LIBRARY.impl(op.name, op.single_result if op.single else op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"horsepower::{op.name}", shape_rule, lib=_LIBRARY)
    OPS[op.name] = op
    return op
