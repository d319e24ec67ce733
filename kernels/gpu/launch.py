"""How a Triton kernel is configured and launched: on a GPU, in Triton's interpreter, or for its machine code alone."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.tables import form_of
from horsepower.kernels.target import target_of

SMS = {"sm_80": 108, "sm_90": 132}  # of an A100 and an H100 (SXM)


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: its compile-time constants, warps of a program, stages of its pipeline."""

    warps: int
    stages: int = 1
    constants: Mapping[str, int] = field(default_factory=dict)
    form: str = ""  # of the operands that it is for, see `tables.form_of`

    def __str__(self) -> str:
        cut = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.form} {cut} warps={self.warps} stages={self.stages}".strip()


@dataclass(frozen=True)
class Place:
    """What a kernel is compiled for: the architecture whose configurations it takes, and its multiprocessors."""

    arch: str
    sms: int


@dataclass
class _DryRun:
    """Where compiled kernels go instead of a GPU."""

    place: Place
    compiled: list[Any] = field(default_factory=list)


_DRY: _DryRun | None = None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def place_of(x: Tensor) -> Place:
    """What kernels are compiled for that work where x lies."""
    if _DRY is not None:
        return _DRY.place
    return Place("sm_90", 3) if interpreted() else _device(x.device.index or 0)


@cache
def _device(index: int) -> Place:
    device = torch.device("cuda", index)
    return Place(target_of(device), torch.cuda.get_device_properties(device).multi_processor_count)


def writes_no_codes(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why nothing can be written in `dtype` where x lies, or None."""
    return "sm_80 writes no FP8" if dtype == E4M3 and x.is_cuda and place_of(x).arch == "sm_80" else None


def default(configs: Mapping[str, Sequence[Config]], *inputs: Any) -> Config:
    """The default configuration for inputs of their form, where the first of them lies."""
    form = form_of(inputs)
    return next(config for config in configs[place_of(inputs[0]).arch] if config.form == form)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any) -> None:
    """Start `kernel` over `grid`, on the device of its first operand; nothing is started for an empty one."""
    if not all(grid):
        return
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    given = {**config.constants, **constants, **options}
    if _DRY is not None:
        _DRY.compiled.append(kernel.warmup(*args, grid=grid, **given))
        return
    first = args[0]  # a tensor, or the descriptor of one
    with torch.cuda.device_of(getattr(first, "base", first)):  # Triton takes the current device; a CPU changes nothing
        kernel[grid](*args, **given)


def compiled(arch: str, run: Callable[[], None]) -> list[Any]:
    """The kernels that `run` would start on a GPU of this architecture, compiled and not started.

    `run` works on meta tensors. Triton's driver is replaced for good: call it in a process of its own.
    """
    global _DRY
    _DRY = _DryRun(Place(arch, SMS[arch]))
    triton.runtime.driver.set_active(_NoDevice(int(arch.removeprefix("sm_"))))
    try:
        run()
        return _DRY.compiled
    finally:
        _DRY = None


class _NoDevice:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int):
        self._target = triton.backends.compiler.GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self._target.arch  # type: ignore[no-any-return]  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target
