"""The import rule: runtime -> graph -> quant -> kernels, never upwards; the face and bench may import anything."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from recordings import ROOT

ORDER = ["kernels", "quant", "graph", "runtime"]
FACE = [path.stem for path in (ROOT / "src" / "horsepower").glob("[a-z]*.py")]
FOLDERS = [*ORDER, "bench", "src"]
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported(source: str, module: str) -> set[str]:
    """Every module that `source` imports, wherever in it, `from` imports with each name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level] if node.level else [])
            origin = ".".join(part for part in (base, node.module) if part)
            names |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return names


def breaches(source: str, folder: str, module: str) -> set[str]:
    """What a file in `folder` imports against the rule."""
    names = imported(source, module)
    found = {name for name in names if name.split(".")[0] in (*ORDER, "bench", "src")}  # not by the full name
    if folder in ORDER:
        above = [*ORDER[ORDER.index(folder) + 1 :], "bench", *FACE]
        found |= {name for name in names for up in above if f"{name}.".startswith(f"horsepower.{up}.")}
        found |= {name for name in names if name in ("horsepower", "horsepower.Engine", "horsepower.Request")}
    return found - {"horsepower"} if "horsepower._native" in names else found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_upwards(path: Path):
    relative = path.relative_to(ROOT)
    module = "horsepower." + ".".join(relative.with_suffix("").parts)
    assert not breaches(path.read_text(), relative.parts[0], module)


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("kernels", "from horsepower.runtime.engine import Engine"),
        ("kernels", "def f():\n    import horsepower.graph"),
        ("graph", "from horsepower import runtime"),
        ("runtime", "from horsepower.bench import measure"),
        ("runtime", "from horsepower import Engine"),
        ("quant", "from ..graph import plan"),
        ("bench", "from kernels.registry import OPS"),
    ],
)
def test_the_rule_finds_breaches(folder, source):
    assert breaches(source, folder, f"horsepower.{folder}.module")


@pytest.mark.parametrize("module", ["horsepower", "horsepower.cli"])
def test_the_face_imports_nothing_heavy(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'numpy', 'av', 'PIL', 'triton') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_only_the_converter_reads_pickles():
    readers = [p.name for p in SOURCES if "pickle" in imported(p.read_text(), "m") or "torch.load" in p.read_text()]
    assert readers == ["convert.py"]
