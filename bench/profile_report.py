"""The parts of a report that profiles of a step and of a clip share."""

import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

from horsepower.bench.plot import Bar, bars
from horsepower.bench.ranges import Entry, Profile, total
from horsepower.bench.report import Cell, Figure, Paragraph, Part, Table, check_file
from horsepower.bench.telemetry import Telemetry
from horsepower.kernels.registry import Cost

Row = tuple[str, int | None, tuple[float, ...], Cost | None]  # name, calls a step, seconds of each, work of a step
RATES = (
    "Rates: of the arithmetic that an entry does, and of the bytes that it must move, each tensor passing memory once."
)


def check_trace(file: str | None) -> None:
    """Raises ValueError for a file that no trace can be written to."""
    if file is None:
        return
    if not file.endswith((".json", ".json.gz")):
        raise ValueError(f"trace: got {file!r}, allowed: a name that ends in .json or .json.gz")
    check_file(file)


def entry_tables(found: Profile, stage: str = "") -> list[Part]:
    """Entries by kind, by block, and the slowest of them. stage: of a clip, whose steps are also summed up."""
    kinds, blocks = _sums(found, "kind"), _sums(found, "block")
    slowest = sorted(((e.name, e.calls, e.seconds, e.place.work) for e in found.entries), key=_median, reverse=True)
    where = f", {stage}" if stage else ""
    return [
        _table(
            f"By kind of entry{where}", "entry", [*kinds, ("(outside of entries)", None, found.outside, None)], found
        ),
        _table(f"By block{where}", "block", blocks, found),
        _table(f"The slowest entries{where}", "entry", slowest[:10], found),
    ]


def entry_figures(found: Profile, stage: str = "") -> list[Part]:
    """Kinds and blocks as bars."""
    where = f", {stage}" if stage else ""
    return [
        _figure(f"Milliseconds a step, by kind of entry{where}", _sums(found, "kind")),
        _figure(f"Milliseconds a step, by block{where}", _sums(found, "block")),
    ]


def slowest(found: Profile) -> Entry:
    """The entry that takes the longest."""
    return max(found.entries, key=lambda entry: statistics.median(entry.seconds))


def inside(found: Profile) -> float:
    """Seconds of a step that its entries are: the median."""
    return statistics.median(map(sum, zip(*(entry.seconds for entry in found.entries), strict=True)))


def gpu_part(telemetry: Telemetry) -> Part:
    """What the GPU did meanwhile, or why nobody knows."""
    if telemetry.missing:
        return Paragraph(f"No telemetry of a GPU: {telemetry.missing}.")
    return Table("The GPU meanwhile", ("", "lowest", "mean", "highest"), tuple(telemetry.rows()))


def commands(what: str, command: str, entry: str | None, on_gpu: bool) -> Iterator[str]:
    """For what only NVIDIA's own profilers see of `what`, which `command` runs once. entry: to look at closely."""
    yield (
        f"NVIDIA's profilers, over one {what}:"
        if on_gpu
        else f"NVIDIA's profilers, over one {what}, on a machine with a GPU:"
    )
    capture = "--capture-range=cudaProfilerApi --capture-range-end=stop"
    yield f"  nsys profile --trace=cuda,nvtx,cublas {capture} -o {what} {command}"
    if entry is not None:
        only = shlex.quote(f"{entry}/")
        yield f"  ncu --profile-from-start off --nvtx --nvtx-include {only} --set full -o slowest {command}"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower one, median, upper one; of a single value it thrice."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _sums(found: Profile, key: str) -> list[Row]:
    """Entries of one kind or block together; kinds by their time, blocks as they follow each other."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in found.entries:
        groups[getattr(entry.place, key)].append(entry)
    rows: list[Row] = [
        (
            name,
            sum(e.calls for e in each),
            tuple(map(sum, zip(*(e.seconds for e in each), strict=True))),
            total(e.place.work for e in each),
        )
        for name, each in groups.items()
    ]
    return sorted(rows, key=_median, reverse=True) if key == "kind" else rows


def _median(row: Row) -> float:
    return statistics.median(row[2])


def _table(title: str, of: str, rows: Sequence[Row], found: Profile) -> Table:
    whole = [sum(each) for each in zip(found.outside, *(entry.seconds for entry in found.entries), strict=True)]

    def cells(name: str, calls: int | None, seconds: tuple[float, ...], work: Cost | None) -> tuple[Cell, ...]:
        share = statistics.median(part / all_ if all_ else 0.0 for part, all_ in zip(seconds, whole, strict=True))
        low, middle, high = quartiles([1e3 * each for each in seconds])
        rates = [each / middle / 1e6 for each in (work.flops, work.bytes)] if work and middle else [None, None]
        return name, calls, middle, low, high, 1e3 * sum(seconds), 100 * share, *rates

    columns = (
        of, "calls", "ms a step", "lower quartile", "upper quartile", f"ms in {len(found.steps)} steps",
        "% of the step", "GFLOP/s", "GB/s",
    )  # fmt: skip
    return Table(title, columns, tuple(cells(*row) for row in rows))


def _figure(title: str, rows: Sequence[Row]) -> Figure:
    def bar(name: str, seconds: tuple[float, ...]) -> Bar:
        low, middle, high = (1e3 * each for each in quartiles(seconds))
        return Bar(name, middle, low, high)

    return Figure(title, bars(title, [bar(name, seconds) for name, _, seconds, _ in rows], mark=0.0))
