"""What an engine was asked for, checked, and what stands for what was left open."""

import torch

from horsepower.kernels.target import target_of
from horsepower.quant.scheme import Scheme
from horsepower.runtime.devices import indexed
from horsepower.runtime.quantised_checkpoint import Stored

MODES = ("fused", "eager")
DTYPES = (torch.bfloat16, torch.float32)


def checked_device(device: str | torch.device | None) -> torch.device:
    """A device by its name; None takes the first GPU, else the CPU. Raises ValueError for one that is not there."""
    if device is None:
        return indexed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, allowed: cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: got {str(chosen)!r}, allowed: cpu, or cuda where torch finds a GPU")
    return indexed(chosen)


def mode_of(mode: str | None, device: torch.device) -> tuple[str, tuple[str, ...]]:
    """The mode that was asked for, else the device's best, and what is to be said of it. Raises ValueError."""
    try:
        target_of(device)
    except ValueError as error:
        if mode not in (None, "eager"):
            raise ValueError(f"mode: got {mode!r}, allowed: eager on {device}; {error}") from None
        return "eager", (f"mode: eager, as there are no fused kernels; {error}",) if mode is None else ()
    if mode not in (None, *MODES):
        raise ValueError(f"mode: got {mode!r}, allowed: {', '.join(MODES)}")
    return mode or MODES[0], ()


def scheme_for(
    asked: Scheme | None, stored: Stored | None, mode: str, device: torch.device, dtype: torch.dtype | None
) -> Scheme | None:
    """Of a model: the one asked for, or its checkpoint's. Raises ValueError for one that cannot be had here."""
    scheme = asked if stored is None else stored.scheme_for(asked)
    if scheme is None:
        return None
    allowed = "eager" if scheme.recipe else "fused"
    if mode != allowed:
        if stored is not None:
            raise ValueError(f"mode: got {mode} with a checkpoint of {stored.scheme}, allowed: {allowed}")
        raise ValueError(f"scheme: got {scheme.name} with mode {mode}, allowed: with mode {allowed}")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"scheme: got {scheme.name} with {dtype}, allowed: with torch.bfloat16")
    return scheme.check(target_of(device))


def dtype_of(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """Of matrix products: the one asked for, else the device's best. Raises ValueError for another."""
    if dtype is None:
        # CPUs without AVX-512 have no fast bfloat16 products.
        slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
        return torch.float32 if slow else torch.bfloat16
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, allowed: {', '.join(map(str, DTYPES))}")
    return dtype


def bytes_of(device_memory: int | None) -> int | None:
    """Of the device, as they were given. Raises ValueError for what is no number of bytes."""
    whole = isinstance(device_memory, int) and not isinstance(device_memory, bool)
    if device_memory is not None and not (whole and device_memory > 0):
        raise ValueError(f"device_memory: got {device_memory!r}, allowed: a positive number of bytes, or None")
    return device_memory
