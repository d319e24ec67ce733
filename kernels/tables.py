"""What `horsepower tune` measured, `kernels/tuned/<op>.<arch>.json`: the candidates of each site and their times.

    {"op": "linear", "arch": "sm_90",
     "machine": {"gpu": ..., "driver": ..., "torch": ..., "triton": ..., "date": "2026-11-21"},
     "sites": {"x=bfloat16[5120] weight=bfloat16[32, 5120] experts=1": [
         {"tokens": 4110, "candidates": [
             {"kernel": "library", "config": null, "us": [10.1, 10.2, 10.4]},
             {"kernel": "triton", "config": "BM=128 ... warps=8 stages=3", "failed": "out of resources: ..."}]}]}}

A site is what does not change with the prompt: shapes without tokens, dtypes, kinds. Its times are of one run, in
microseconds: lower quartile, median, upper quartile. Read here, by the compiler and when a kernel is chosen, once each
process; never written while a request runs. A table that does not fit the kernels there are is an error.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.target import target_of

if TYPE_CHECKING:
    from horsepower.kernels.registry import Kernel, Op

FOLDER = Path(__file__).parent / "tuned"
PARTS = "parts"  # the candidate that is the operator's expansion
# Tensors whose rows are not tokens.
WEIGHTS = frozenset(
    ["weight", "weight_scale", "bias", "gain", "post_gain", "q_gain", "k_gain", "inverse", "scales"]
)  # fmt: skip
# Of the prompt, or without effect on time; values are as wide as keys.
VARYING = frozenset(["counts", "frames", "video", "eps", "v"])


@dataclass(frozen=True)
class Site:
    """Inputs of an operator, as far as they decide which candidate is the fastest."""

    key: str
    tokens: int

    @classmethod
    def of(cls, op: "Op", inputs: Sequence[Any]) -> "Site":
        """Of inputs in the order of the schema; tensors may be on any device."""
        named = zip(arguments(op.schema), inputs, strict=False)  # the last ones may have their defaults
        parts = (f"{name}={text}" for name, value in named if (text := _described(name, value)))
        return cls(" ".join(parts), inputs[0].shape[0])


@cache
def arguments(schema: str) -> tuple[str, ...]:
    """Names of an operator's arguments."""
    return tuple(re.findall(r"(\w+)(?:=\w+)?(?=[,)])", schema.split("->")[0]))


def _described(name: str, value: Any) -> str:
    if value is None or name in VARYING:
        return ""
    if isinstance(value, Tensor):
        shape = value.shape if name in WEIGHTS else value.shape[1:]
        return f"{_text(value.dtype)}{list(shape)}"
    return _text(value) if isinstance(value, torch.dtype) else str(value)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Candidate:
    """One way to compute a site: a kernel of its operator, in Triton in one configuration, or the operator's parts."""

    kernel: str
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.kernel} {self.config}" if self.config else self.kernel


@dataclass(frozen=True)
class Timed:
    """A candidate that was measured, or why it could not be."""

    candidate: Candidate
    us: tuple[float, float, float] | None = None  # lower quartile, median, upper quartile
    failed: str | None = None

    @property
    def median(self) -> float:
        return math.inf if self.us is None else self.us[1]


@dataclass(frozen=True)
class Point:
    """A site measured at one number of tokens."""

    tokens: int
    timed: tuple[Timed, ...]

    def best(self, *kernels: str) -> Timed | None:
        """The fastest of all candidates, or of these kernels'; None if none ran."""
        ran = [each for each in self.timed if each.us and (not kernels or each.candidate.kernel in kernels)]
        return min(ran, key=lambda each: each.median, default=None)


@dataclass(frozen=True)
class Table:
    """What was measured of an operator on one architecture."""

    op: str
    arch: str
    machine: Mapping[str, str]
    sites: Mapping[str, tuple[Point, ...]]

    def at(self, site: Site) -> Point | None:
        """The point whose tokens are the nearest by their ratio; None for a site that was not measured."""
        points = self.sites.get(site.key, ())
        return min(points, key=lambda point: abs(math.log(point.tokens / max(site.tokens, 1))), default=None)


def measured(op: "Op", inputs: Sequence[Any], arch: str | None = None) -> Point | None:
    """What was measured nearest to these inputs, for an architecture or for where they lie; None for nothing.

    Raises ValueError for a table that cannot be used.
    """
    arch = arch or _arch_of(inputs)
    found = None if arch is None else table(op, arch)
    return None if found is None else found.at(Site.of(op, inputs))


def ranked(op: "Op", inputs: Sequence[Any]) -> tuple["Kernel", ...]:
    """The operator's kernels: those that were measured by their times, then the others as they are predicted."""
    point = measured(op, inputs)
    if point is None:
        return op.kernels
    times = {kernel.name: found.median for kernel in op.kernels if (found := point.best(kernel.name))}
    return tuple(sorted(op.kernels, key=lambda kernel: times.get(kernel.name, math.inf)))


def tuned_config(op: "Op", inputs: Sequence[Any]) -> Any:
    """The configuration of the Triton kernel that was the fastest nearest to these inputs; None for the default."""
    point = measured(op, inputs)
    best = point and point.best("triton")
    return best and configs(op.name, _arch_of(inputs) or "")[best.candidate.config or ""]


@cache
def configs(op: str, arch: str, form: str | None = None) -> Mapping[str, Any]:
    """The configurations of an operator's Triton kernel by their text, the default first: all, or those of a form."""
    found = import_module(f"horsepower.kernels.gpu.{op}").CONFIGS[arch]
    return {str(config): config for config in found if form in (None, config.form)}


def form_of(inputs: Sequence[Any]) -> str:
    """What a matrix product is of: "fp8", both operands in e4m3; "w8a16", the weight alone; "" for anything else."""
    weight = inputs[1] if len(inputs) > 1 else None
    if not isinstance(weight, Tensor) or weight.dtype != E4M3:
        return ""
    return "fp8" if inputs[0].dtype == E4M3 else "w8a16"


def _arch_of(inputs: Sequence[Any]) -> str | None:
    """Of the GPU that the tensors lie on; None if on none."""
    device = next(x.device for x in inputs if isinstance(x, Tensor))
    return _arch(device) if device.type == "cuda" else None


_arch = cache(target_of)
_READ: dict[tuple[Path, str, str], Table | None] = {}


def table(op: "Op", arch: str) -> Table | None:
    """The table of an operator and architecture, if there is one. Raises ValueError for one that cannot be used."""
    where = FOLDER, op.name, arch
    if where not in _READ:
        path = FOLDER / f"{op.name}.{arch}.json"
        _READ[where] = parse(path.read_text(encoding="utf-8"), op, arch, path.name) if path.is_file() else None
    return _READ[where]


def write(found: Table, folder: Path) -> Path:
    """Store a table, whole or not at all; from now on it is what is read in that folder."""
    path = folder / f"{found.op}.{found.arch}.json"
    draft = path.with_name(f".{path.name}.part")
    try:
        draft.write_text(_dump(found), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    _READ.pop((folder, found.op, found.arch), None)
    return path


def _dump(found: Table) -> str:
    sites = {
        key: [{"tokens": point.tokens, "candidates": [_stored(each) for each in point.timed]} for point in points]
        for key, points in found.sites.items()
    }
    stored = {"op": found.op, "arch": found.arch, "machine": dict(found.machine), "sites": sites}
    return json.dumps(stored, indent=1) + "\n"


def _stored(timed: Timed) -> dict[str, Any]:
    name = {"kernel": timed.candidate.kernel, "config": timed.candidate.config}
    return {**name, "us": list(timed.us)} if timed.us else {**name, "failed": timed.failed}


def parse(text: str, op: "Op", arch: str, file: str) -> Table:
    """A table from its text. Raises ValueError naming the file, the field, what it got and what is allowed."""

    def expect(allowed: bool, field: str, got: object, what: str) -> None:
        if not allowed:
            raise ValueError(f"{file}: {field}: got {got!r}, allowed: {what}; run `horsepower tune` again")

    try:
        stored = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: file: got {error}, allowed: JSON; run `horsepower tune` again") from error
    fields = ("op", "arch", "machine", "sites")
    expect(isinstance(stored, dict) and sorted(stored) == sorted(fields), "fields", stored, ", ".join(fields))
    expect(stored["op"] == op.name, "op", stored["op"], op.name)
    expect(stored["arch"] == arch, "arch", stored["arch"], arch)
    for field in ("machine", "sites"):
        expect(isinstance(stored[field], dict), field, stored[field], "an object")
    sites = {}
    for key, points in stored["sites"].items():
        expect(isinstance(points, list) and bool(points), "sites", points, "a list of points")
        sites[key] = tuple(_point(point, op, arch, expect) for point in points)
    return Table(op.name, arch, stored["machine"], sites)


def _point(stored: Any, op: "Op", arch: str, expect: Any) -> Point:
    expect(isinstance(stored, dict) and sorted(stored) == ["candidates", "tokens"], "point", stored, "as described")
    tokens, candidates = stored["tokens"], stored["candidates"]
    expect(type(tokens) is int and tokens > 0, "tokens", tokens, "an integer above 0")
    expect(isinstance(candidates, list), "candidates", candidates, "a list")
    return Point(tokens, tuple(_timed(each, op, arch, expect) for each in candidates))


def _timed(stored: Any, op: "Op", arch: str, expect: Any) -> Timed:
    names = [kernel.name for kernel in op.kernels if "cuda" in kernel.devices] + [PARTS] * (op.expand is not None)
    result = {"us", "failed"} & set(stored) if isinstance(stored, dict) else set()
    allowed = len(result) == 1 and set(stored) == {"kernel", "config", *result}
    expect(allowed, "candidate", stored, "kernel, config, and us or failed")
    kernel, config = stored["kernel"], stored["config"]
    expect(kernel in names, "kernel", kernel, ", ".join(names))
    known: tuple[str | None, ...] = tuple(configs(op.name, arch)) if kernel == "triton" else (None,)
    expect(config in known, "config", config, ", ".join(map(str, known)))
    if "failed" in stored:
        expect(isinstance(stored["failed"], str), "failed", stored["failed"], "a reason")
        return Timed(Candidate(kernel, config), failed=stored["failed"])
    us = stored["us"]
    numbers = isinstance(us, list) and len(us) == 3 and all(type(x) in (int, float) for x in us)
    expect(numbers and 0 < us[0] <= us[1] <= us[2] < math.inf, "us", us, "three times above 0, in order")
    return Timed(Candidate(kernel, config), (us[0], us[1], us[2]))
