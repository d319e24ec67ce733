"""One report, three forms: text for a terminal, JSON for a program, one self-contained page of HTML."""

import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Cell: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; a float shows four digits, None a dash."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing for the page; the terminal leaves it out."""

    title: str
    svg: str  # one <svg> element that refers to nothing outside


Part: TypeAlias = Paragraph | Table | Figure


@dataclass(frozen=True)
class Report:
    title: str
    machine: str  # and versions: what figures need to mean something
    parts: tuple[Part, ...]

    def text(self) -> str:
        blocks = [f"{self.title}\n{self.machine}"]
        for part in self.parts:
            if isinstance(part, Paragraph):
                blocks.append(part.text)
            elif isinstance(part, Table):
                blocks.append("\n".join(_text_table(part)))
        return "\n\n".join(blocks)

    def json(self) -> str:
        """`{"title", "machine", "text", "tables": [{"title", "note", "rows": [{column: cell}]}]}`."""
        tables = [part for part in self.parts if isinstance(part, Table)]
        return json.dumps(
            {
                "title": self.title,
                "machine": self.machine,
                "text": [part.text for part in self.parts if isinstance(part, Paragraph)],
                "tables": [
                    {"title": t.title, "note": t.note, "rows": [dict(zip(t.columns, r, strict=True)) for r in t.rows]}
                    for t in tables
                ],
            },
            indent=2,
        )

    def html(self) -> str:
        body = [f"<h1>{html.escape(self.title)}</h1><p>{html.escape(self.machine)}</p>"]
        for part in self.parts:
            if isinstance(part, Paragraph):
                body.append(f"<p>{html.escape(part.text)}</p>")
            elif isinstance(part, Table):
                body.append(_html_table(part))
            else:
                body.append(f"<figure>{part.svg}<figcaption>{html.escape(part.title)}</figcaption></figure>")
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
        )


def write(path: str, content: str) -> None:
    """Write a report whole or not at all. Raises ValueError as `check_file`."""
    target = check_file(path)
    draft = target.with_name(f".{target.name}.part")
    try:
        draft.write_text(content, encoding="utf-8")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def check_file(path: str) -> Path:
    """Where a report is to be written, before the work that it takes. Raises ValueError if it cannot be there."""
    target = Path(path)
    if not target.parent.is_dir() or target.is_dir() or not os.access(target.parent, os.W_OK):
        raise ValueError(f"file: got {path!r}, allowed: a file in a folder that exists and can be written to")
    return target


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _text_table(table: Table) -> list[str]:
    rows = [table.columns, *(tuple(map(_shown, row)) for row in table.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    numeric = [_is_numeric(table.rows, i) for i in range(len(table.columns))]
    lines = [table.title]
    for row in rows:
        cells = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        lines.append("  " + "  ".join(cells).rstrip())
    return [*lines, *([table.note] if table.note else [])]


def _html_table(table: Table) -> str:
    numeric = [_is_numeric(table.rows, i) for i in range(len(table.columns))]

    def row(tag: str, cells: Sequence[str]) -> str:
        kinds = (' class="n"' if n else "" for n in numeric)
        return "<tr>" + "".join(f"<{tag}{k}>{html.escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))

    rows = [row("th", table.columns), *(row("td", [_shown(cell) for cell in cells]) for cells in table.rows)]
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return f"<h2>{html.escape(table.title)}</h2><table>{''.join(rows)}</table>{note}"


def _is_numeric(rows: tuple[tuple[Cell, ...], ...], column: int) -> bool:
    return any(isinstance(row[column], int | float) for row in rows)


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin-top: 2em; }
table { border-collapse: collapse; } th, td { padding: .2em .8em; border-bottom: 1px solid #8886; text-align: left; }
.n { text-align: right; font-variant-numeric: tabular-nums; } figure { margin: 2em 0; } svg { max-width: 100%; }
p { white-space: pre-line; }
""".strip()
