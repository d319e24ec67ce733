"""What memory a device has free, and the order of work on a GPU."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from types import TracebackType

import torch


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one that kernels, streams and events without a device of their own are for."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def indexed(device: torch.device) -> torch.device:
    """A GPU with its number, as tensors name it."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device, the caching allocator's own reserve counted in."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            fields = dict(line.split(":", 1) for line in f)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_free(needed: int, device: torch.device) -> None:
    """Raise torch.OutOfMemoryError, with what is missing, if a GPU has less than `needed` bytes free."""
    if device.type == "cuda" and needed > (free := free_bytes(device)):
        gib = 2.0**30
        raise torch.OutOfMemoryError(
            f"activations: got {needed / gib:.2f} GiB to place, allowed: {free / gib:.2f} GiB free on {device}; "
            f"{(needed - free) / gib:.2f} GiB are missing"
        )


class StreamOrder:
    """Work on memory that goes from call to call, each perhaps on a stream of its own: one waits for the other.

    On a CPU there is nothing to wait for.
    """

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"
        self._done: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._gpu:
            self._done = torch.cuda.Event()
            self._done.record()

    @cached_property
    def side(self) -> torch.cuda.Stream:
        """A stream to capture this work on: libraries keep scratch memory by stream, which no other work may share."""
        return torch.cuda.Stream()

    def finish(self) -> None:
        """Wait until the memory can be given back."""
        if self._done is not None:
            self._done.synchronize()
