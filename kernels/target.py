"""What a plan is made for: the CPU, or GPUs of one architecture."""

import torch

GPUS = ("sm_80", "sm_90")  # as an A100, as an H100
TARGETS = ("cpu", *GPUS)


def target_of(device: torch.device) -> str:
    """The target that a device is; the meta device counts as the CPU.

    Raises ValueError for a device that there are no kernels for.
    """
    if device.type in ("cpu", "meta"):
        return "cpu"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return "sm_90" if major >= 9 else "sm_80"
        raise ValueError(f"device: got {device} of capability {major}.{minor}, allowed: 8.0 or newer")
    raise ValueError(f"device: got {device}, allowed: cpu, cuda")


def check_target(target: str) -> str:
    """The target itself. Raises ValueError."""
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}, allowed: {', '.join(TARGETS)}")
    return target
