"""What the command line prints and writes: progress, a clip in short, reports."""

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from horsepower.bench.report import Report
    from horsepower.runtime.request import Progress, Result


def say(line: str) -> None:
    """What goes on, where somebody looks."""
    if sys.stderr.isatty():
        print(f"... {line}", file=sys.stderr, flush=True)


def show(progress: "Progress") -> None:
    """A bar for a stage, on one line that is written over."""
    bar = "#" * (20 * progress.step // progress.steps)
    done = progress.step == progress.steps
    line = f"\r{progress.stage:<18} [{bar:<20}] {progress.step}/{progress.steps}"
    print(line, end="\n" if done else "", file=sys.stderr, flush=True)


def summarise(result: "Result", output: str) -> None:
    """What was made, what it took, and the notes."""
    width, height = result.size
    frames = len(result.video)
    print(f"{output}: {width}x{height}, {frames} frames at {result.fps} a second, sound at {result.sample_rate} Hz")
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.timings.stages.items())
    print(f"{result.timings.total:.1f} s ({stages}), peak memory {result.timings.peak_memory / 2**30:.2f} GiB")
    for note in result.notes:
        print(f"note: {note}")


def check_files(arguments: argparse.Namespace) -> None:
    """Whether --json and --html can be written: before the work, not after it. Raises ValueError."""
    from horsepower.bench.report import check_file

    for path in (arguments.json, arguments.html):
        if path is not None:
            check_file(path)


def publish(arguments: argparse.Namespace, brief: "Report", full: "Report") -> None:
    """Print a report in brief, write it in full."""
    from horsepower.bench.report import write

    print(brief.text())
    if arguments.json is not None:
        write(arguments.json, full.json())
    if arguments.html is not None:
        write(arguments.html, full.html())
