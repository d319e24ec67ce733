"""Power, clocks, temperature and memory of a GPU while something runs, as NVML tells them."""

import statistics
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

QUANTITIES: Mapping[str, Callable[[Any, Any], float]] = {
    "power, W": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    "SM clock, MHz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory clock, MHz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "temperature, C": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "memory in use, MiB": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**20,
}


class Telemetry:
    """Samples a GPU from a thread, every `period` seconds while it is entered, at least once.

    `missing` says why there is nothing to sample; it is empty if there is. Never raises for what is missing.
    """

    def __init__(self, device: torch.device, period: float = 0.01):
        self._period, self._stop = period, threading.Event()
        self._samples: dict[str, list[float]] = {name: [] for name in QUANTITIES}
        self._nvml, self._gpu, self.missing = _open(device)

    def __enter__(self) -> "Telemetry":
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._nvml is not None:
            self._nvml.nvmlShutdown()

    def rows(self) -> list[tuple[str, float, float, float]]:
        """Of each quantity that the GPU tells: its name and unit, the lowest, mean and highest sample."""
        return [(name, min(got), statistics.fmean(got), max(got)) for name, got in self._samples.items() if got]

    def _run(self) -> None:
        while self._nvml is not None:
            for name, read in QUANTITIES.items():
                try:
                    self._samples[name].append(read(self._nvml, self._gpu))
                except self._nvml.NVMLError:  # a GPU need not tell everything
                    continue
            if self._stop.wait(self._period):
                return


def _open(device: torch.device) -> tuple[Any, Any, str]:
    """NVML, the device in it, and why there is neither."""
    try:
        import pynvml
    except ImportError:
        return None, None, "the package nvidia-ml-py is not installed (pip install 'horsepower[gpu]')"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, None, f"NVML says: {error}"
    try:
        if device.type != "cuda":
            raise LookupError("this runs on the CPU")
        uuid = torch.cuda.get_device_properties(device).uuid  # NVML counts GPUs that the process does not see, too
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), ""
    except (LookupError, pynvml.NVMLError) as error:
        pynvml.nvmlShutdown()
        return None, None, str(error)
