"""Plots as inline SVG: no script, nothing from outside, in the page's own text colour on light and dark."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_ROW, _LABEL, _WIDTH, _VALUE = 28, 210, 420, 60  # pixels: height of a row, widths of labels, bars and values


@dataclass(frozen=True)
class Bar:
    """A value and the range that it was found in."""

    label: str
    value: float
    low: float
    high: float


def bars(title: str, rows: Sequence[Bar], mark: float = 1.0) -> str:
    """Horizontal bars from 0 with whiskers from low to high, and a dashed line at `mark`.

    Raises ValueError for values below 0 or that are no numbers.
    """
    for row in rows:
        if not all(math.isfinite(x) and x >= 0 for x in (row.value, row.low, row.high)):
            raise ValueError(f"rows: got {row}, allowed: finite numbers from 0")
    top = max([mark, *(max(row.value, row.high) for row in rows)]) or 1.0
    height = _ROW * (len(rows) + 1)
    said = "; ".join(f"{row.label} {row.value:.3g} ({row.low:.3g} to {row.high:.3g})" for row in rows)
    shapes = [shape for i, row in enumerate(rows) for shape in _bar(row, _ROW * i, top)]
    x = _at(mark, top)
    return (
        f'<svg role="img" viewBox="0 0 {_LABEL + _WIDTH + _VALUE} {height}" width="{_LABEL + _WIDTH + _VALUE}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="currentColor">'
        f"<title>{html.escape(title)}</title><desc>{html.escape(said)}</desc>{''.join(shapes)}"
        f'<path d="M{x} 0V{height - _ROW}" stroke="currentColor" stroke-dasharray="3 3"/>'
        f'<text x="{x}" y="{height - _ROW + 16}" text-anchor="middle">{mark:g}</text></svg>'
    )


@dataclass(frozen=True)
class Line:
    """Values at 0, 1, 2, ...; None where there is none."""

    label: str
    values: Sequence[float | None]


_COLOURS = ("#4c82b8", "#c2571a", "#3f8f4f", "#9a5bb0", "#8a7000")  # 3:1 and more against white and against near-black
_HEIGHT, _EDGE = 240, 50  # pixels


def lines(title: str, series: Sequence[Line], mark: float, across: str) -> str:
    """Up to four lines from 0, with their points, and a dashed line at `mark`; across: what their places are.

    Raises ValueError for more lines, and for values below 0 or that are no numbers.
    """
    if len(series) > len(_COLOURS):
        raise ValueError(f"series: got {len(series)}, allowed: at most {len(_COLOURS)}")
    values = [value for line in series for value in line.values if value is not None]
    if not all(math.isfinite(value) and value >= 0 for value in (*values, mark)):
        raise ValueError(f"series: got {max(values, default=mark)}, allowed: finite numbers from 0")
    top, last = 1.05 * max([mark, *values]) or 1.0, max((len(line.values) for line in series), default=1) - 1

    def at(i: int, value: float) -> str:
        return f"{_EDGE + _WIDTH * i / max(1, last):.1f} {_HEIGHT * (1 - value / top) + 20:.1f}"

    shapes = []
    for n, (line, colour) in enumerate(zip(series, _COLOURS, strict=False)):
        points = [at(i, value) for i, value in enumerate(line.values) if value is not None]
        dots = "".join(f"M{point}h0" for point in points)
        y = 30 + 20 * n
        shapes.append(f'<path d="M{"L".join(points)}" stroke="{colour}" fill="none"/>' if points else "")
        shapes.append(f'<path d="{dots}" stroke="{colour}" stroke-width="5" stroke-linecap="round"/>' if points else "")
        shapes.append(f'<text x="{_EDGE + _WIDTH + 14}" y="{y}" fill="{colour}">{html.escape(line.label)}</text>')
    said = "; ".join(
        f"{line.label} {min(own):.3g} to {max(own):.3g}"
        for line in series
        if (own := [value for value in line.values if value is not None])
    )
    bottom, x = _HEIGHT + 20, _EDGE + _WIDTH
    height = at(0, mark).split()[1]
    return (
        f'<svg role="img" viewBox="0 0 {x + 80} {bottom + 40}" width="{x + 80}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="currentColor">'
        f"<title>{html.escape(title)}</title><desc>{html.escape(said)}</desc>"
        f'<path d="M{_EDGE} 20V{bottom}H{x}" stroke="currentColor" fill="none"/>{"".join(shapes)}'
        f'<path d="M{_EDGE} {height}H{x}" stroke="currentColor" stroke-dasharray="3 3"/>'
        f'<text x="{_EDGE - 6}" y="{float(height) + 4:.1f}" text-anchor="end">{mark:g}</text>'
        f'<text x="{_EDGE}" y="{bottom + 16}" text-anchor="middle">0</text>'
        f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{last}</text>'
        f'<text x="{_EDGE + _WIDTH // 2}" y="{bottom + 32}" text-anchor="middle">{html.escape(across)}</text></svg>'
    )


def _bar(row: Bar, y: int, top: float) -> list[str]:
    low, high, middle = _at(row.low, top), _at(row.high, top), y + _ROW / 2
    return [
        f'<text x="{_LABEL - 8}" y="{middle + 4:g}" text-anchor="end">{html.escape(row.label)}</text>',
        f'<rect x="{_LABEL}" y="{y + 5}" width="{_at(row.value, top) - _LABEL:.1f}" height="{_ROW - 10}" '
        'fill="#4c82b8"/>',  # 4:1 and more against white and against near-black
        f'<path d="M{low} {middle:g}H{high}M{low} {middle - 4:g}v8M{high} {middle - 4:g}v8" stroke="currentColor"/>',
        f'<text x="{_at(max(row.value, row.high), top) + 6:.1f}" y="{middle + 4:g}">{row.value:.2f}</text>',
    ]


def _at(value: float, top: float) -> float:
    """Where a value lies, in pixels."""
    return round(_LABEL + _WIDTH * value / top, 1)
