"""horsepower: single-stream audio-video diffusion, from prompt to clip through one door, `Engine.run`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from horsepower.explaining import explain as explain
    from horsepower.runtime.compiled import Compiled as Compiled
    from horsepower.runtime.compiled import compile as compile
    from horsepower.runtime.engine import Engine as Engine
    from horsepower.runtime.request import Cancelled as Cancelled
    from horsepower.runtime.request import Progress as Progress
    from horsepower.runtime.request import Request as Request
    from horsepower.runtime.request import Result as Result
    from horsepower.verifying import verify as verify

__version__ = "0.1.0"
__all__ = ["Cancelled", "Compiled", "Engine", "Progress", "Request", "Result", "compile", "explain", "verify"]

_HOME = {
    "Compiled": "horsepower.runtime.compiled",
    "compile": "horsepower.runtime.compiled",
    "Engine": "horsepower.runtime.engine",
    "Cancelled": "horsepower.runtime.request",
    "Progress": "horsepower.runtime.request",
    "Request": "horsepower.runtime.request",
    "Result": "horsepower.runtime.request",
    "explain": "horsepower.explaining",
    "verify": "horsepower.verifying",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `horsepower --help` and `import horsepower` do not pay for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'horsepower' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
