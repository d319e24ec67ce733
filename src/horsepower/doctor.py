"""`horsepower doctor`: what this machine has, what it lacks, and what that means."""

import platform
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    part: str
    found: str  # a version or a description; empty if it is not there
    means: str  # what having it is good for, or what lacking it costs


# Distribution, what it is good for, what lacking it costs.
PACKAGES = (
    ("diffusers", "image, video and audio codecs", "no sound can be decoded, no image or sound given"),
    ("transformers", "the released models' text encoder", "only the preset foal runs"),
    ("av", "mp4 out, sound in", "clips cannot be saved, sound cannot be given"),
    ("pillow", "images in", "no image can be given"),
    ("triton", "fused GPU kernels", "no fused kernels on a GPU"),
    ("flash-attn", "a candidate for GPU attention", "our own and torch's attention are the candidates"),
    ("transformer-engine", "the schemes te and te-block on Hopper", "only horsepower's own schemes of eight bits"),
    ("nvidia-ml-py", "power and clocks of a GPU in `horsepower profile`", "profiles do without power and clocks"),
)


def findings() -> list[Finding]:
    """Look at everything; never raises for what is missing."""
    return [
        Finding("python", platform.python_version(), platform.platform()),
        _torch(),
        _driver(),
        _gpu(),
        _native(),
        *(_package(*row) for row in PACKAGES),
    ]


def report() -> str:
    """The findings as a table."""
    rows = findings()
    return "\n".join(
        f"{'ok' if row.found else '--'}  {row.part:<19} {row.found or 'missing':<22} {row.means}" for row in rows
    )


def _package(name: str, good_for: str, lacking: str) -> Finding:
    try:
        return Finding(name, version(name), good_for)
    except PackageNotFoundError:
        return Finding(name, "", lacking)


def _torch() -> Finding:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"
    return Finding("torch", str(torch.__version__), f"{built}, {torch.get_num_threads()} threads")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "", "no GPU that torch can use: everything runs on the CPU")
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    memory = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    fp8 = (
        "FP8 units" if (properties.major, properties.minor) >= (8, 9) else "no FP8 units: FP8 is a weight format there"
    )
    return Finding("gpu", properties.name, f"sm_{properties.major}{properties.minor}, {memory}, {fp8}")


def _driver() -> Finding:
    found = driver()
    return Finding("driver", found, "the NVIDIA kernel module" if found else "no NVIDIA driver is loaded")


def driver() -> str:
    """The version of NVIDIA's kernel module; empty if none is loaded."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""
    number = re.search(r"\b\d+(\.\d+)+\b", first)
    return number.group() if number else "present"


def _native() -> Finding:
    try:
        library = import_module("horsepower.kernels.native_library")
    except ImportError as error:
        return Finding("native kernels", "", f"the compiled module does not load ({error})")
    return Finding("native kernels", library.ISAS[0], f"this CPU runs {', '.join(library.ISAS)}")
