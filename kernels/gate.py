"""The gate that a Triton kernel must pass on any machine: its machine code for a GPU, and what is wrong with it."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING

import torch

import horsepower.kernels.ops  # noqa: F401  (every operator is registered now)
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.registry import OPS
from horsepower.kernels.tables import configs, form_of
from horsepower.kernels.target import GPUS

if TYPE_CHECKING:
    from horsepower.kernels.gpu.machine_code import MachineCode


@dataclass(frozen=True)
class Gated:
    """A kernel as one of its operator's configurations compiles it for one of its examples."""

    op: str
    example: str
    config: str
    kernel: str
    code: "MachineCode | None"  # None if it does not compile
    faults: tuple[str, ...]


def twins() -> tuple[str, ...]:
    """The operators that have a Triton kernel."""
    return tuple(sorted(op.name for op in OPS.values() if any(kernel.name == "triton" for kernel in op.kernels)))


def gate(arch: str, ops: Sequence[str] = ()) -> list[Gated]:
    """Compile every configuration that is checked in, of these operators or of all, in as many processes as cores.

    Needs no GPU. Raises ValueError for an architecture or operator that is not there.
    """
    if arch not in GPUS:
        raise ValueError(f"arch: got {arch!r}, allowed: {', '.join(GPUS)}")
    known = twins()
    for op in ops:
        if op not in known:
            raise ValueError(f"op: got {op!r}, allowed: {', '.join(known)}")
    fresh = multiprocessing.get_context("spawn")  # the interpreter, and a driver, are for a process's whole life
    with ProcessPoolExecutor(os.cpu_count(), fresh, _compile_only) as pool:
        return list(chain.from_iterable(pool.map(partial(_gate, arch), ops or known)))


def _compile_only() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _gate(arch: str, op: str) -> list[Gated]:
    return list(_compiled(arch, op))


def _compiled(arch: str, name: str) -> Iterator[Gated]:
    """Every kernel that the operator starts, for each example and configuration."""
    from horsepower.kernels.gpu.launch import compiled
    from horsepower.kernels.gpu.machine_code import machine_code

    op, twin = OPS[name], import_module(f"horsepower.kernels.gpu.{name}")
    for example, inputs in twin.examples():
        if arch == "sm_80" and any(each.dtype == E4M3 for each in op.outputs(*inputs)):
            continue  # it has no instruction for that
        form = form_of(inputs)
        for config in configs(name, arch, form).values():
            workspace = torch.empty(op.workspace(["cuda"], *inputs), dtype=torch.uint8, device="meta")
            run = partial(twin.run, op.outputs(*inputs), workspace, *inputs, config=config)
            try:
                kernels = compiled(arch, run)
            except Exception as error:  # whatever a compiler raises: the table says so
                yield Gated(name, example, str(config), "", None, (f"does not compile: {error}",))
                continue
            for kernel in kernels:
                code = machine_code(kernel)
                faults = tuple(code.faults(arch, twin.CLAIMS[arch][kernel.metadata.name], form))
                yield Gated(name, example, str(config), kernel.metadata.name, code, faults)
