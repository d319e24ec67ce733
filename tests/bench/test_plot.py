import re
import xml.etree.ElementTree as ET

import pytest

from horsepower.bench.plot import Bar, bars

SVG = "{http://www.w3.org/2000/svg}"
ROWS = [Bar("eager", 1, 1, 1), Bar("a <fused> & b", 2, 1.5, 4)]


def parsed(rows, mark=1.0):
    return ET.fromstring(bars("Speed & size", rows, mark).replace("<svg ", f'<svg xmlns="{SVG[1:-1]}" ', 1))


def test_lengths_are_in_proportion_and_fit():
    svg = parsed(ROWS)
    first, second = (float(rect.get("width")) for rect in svg.iter(f"{SVG}rect"))
    assert second == pytest.approx(2 * first, abs=0.2)
    whiskers = [path.get("d") for path in svg.iter(f"{SVG}path") if path.get("stroke-dasharray") is None]
    low, high = map(float, re.match(r"M([\d.]+) [\d.]+H([\d.]+)M", whiskers[1]).groups())
    assert (high - low) == pytest.approx(2.5 * first, abs=0.2)
    width = float(svg.get("width"))
    assert all(float(text.get("x")) < width for text in svg.iter(f"{SVG}text"))


def test_what_is_drawn_is_also_said():
    svg = parsed(ROWS)
    assert svg.get("role") == "img"
    assert svg[0].text == "Speed & size"  # the title comes first
    assert "a <fused> & b 2 (1.5 to 4)" in svg[1].text
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert texts == ["eager", "1.00", "a <fused> & b", "2.00", "1"]


def test_nothing_to_draw_is_a_mark_alone():
    assert not list(parsed([]).iter(f"{SVG}rect"))
    assert len(list(parsed([], 0).iter(f"{SVG}path"))) == 1


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_what_cannot_be_drawn(value):
    with pytest.raises(ValueError, match="rows: got .*, allowed: finite"):
        bars("t", [Bar("x", value, 0, 1)])
