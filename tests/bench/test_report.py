import json
import re

import pytest

from horsepower.bench.report import Figure, Paragraph, Report, Table, write

REPORT = Report(
    "Fused <and> eager",
    "a CPU, torch 2",
    (
        Paragraph("What was measured."),
        Table("Steps", ("rung", "ratio"), (("eager", 1.0), ("a & b", 2.123456), ("none", None)), "medians"),
        Figure("A bar", '<svg viewBox="0 0 1 1"><rect width="1" height="1"/></svg>'),
    ),
)


def test_text_aligns_columns():
    lines = REPORT.text().splitlines()
    assert lines[:2] == ["Fused <and> eager", "a CPU, torch 2"]
    start = lines.index("Steps")
    assert lines[start + 1 : start + 6] == [
        "  rung   ratio",
        "  eager      1",
        "  a & b  2.123",
        "  none       -",
        "medians",
    ]
    assert "svg" not in REPORT.text()


def test_json_keeps_all_digits():
    table = json.loads(REPORT.json())["tables"][0]
    assert table["rows"][1] == {"rung": "a & b", "ratio": 2.123456}
    assert table["note"] == "medians"


def test_html_is_self_contained_and_escaped():
    page = REPORT.html()
    assert "Fused &lt;and&gt; eager" in page
    assert "a &amp; b" in page
    assert "<svg" in page
    assert not re.search(r"(src|href)=|https?://|<script", page)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write(str(tmp_path / "report.html"), "one")
    write(str(tmp_path / "report.html"), "two")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.html", "two")]
    with pytest.raises(ValueError, match="a folder that exists"):
        write(str(tmp_path / "missing" / "report.html"), "one")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="a folder that exists"):
        write(str(tmp_path / "folder"), "one")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "report.html"]
