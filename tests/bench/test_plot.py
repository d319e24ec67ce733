import re
import xml.etree.ElementTree as ET

import pytest

from horsepower.bench.plot import Bar, Line, bars, lines

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


LINES = [Line("up <&>", [0.1, 0.2, None, 0.4]), Line("down", [0.3, 0.3, 0.3, 0.3])]


def drawn(series, mark=0.5):
    return ET.fromstring(
        lines("Error & layer", series, mark, "layer").replace("<svg ", f'<svg xmlns="{SVG[1:-1]}" ', 1)
    )


def test_lines_rise_with_their_values_and_skip_what_is_missing():
    paths = [path.get("d") for path in drawn(LINES).iter(f"{SVG}path") if path.get("stroke") == "#4c82b8"]
    points = [tuple(map(float, point.split())) for point in paths[0].removeprefix("M").split("L")]
    assert len(points) == 3
    (x0, y0), (x1, y1), (x3, y3) = points
    assert x3 - x0 == pytest.approx(3 * (x1 - x0), abs=0.2)
    assert y0 - y3 == pytest.approx(3 * (y0 - y1), abs=0.3)
    mark = next(path.get("d") for path in drawn(LINES).iter(f"{SVG}path") if path.get("stroke-dasharray"))
    assert float(re.match(r"M[\d.]+ ([\d.]+)H", mark)[1]) == pytest.approx(y3 - (y1 - y3) / 2, abs=0.3)


def test_lines_are_said_too():
    svg = drawn(LINES)
    assert svg[0].text == "Error & layer"
    assert svg[1].text == "up <&> 0.1 to 0.4; down 0.3 to 0.3"
    assert {"up <&>", "down", "layer", "0.5", "0", "3"} <= {text.text for text in svg.iter(f"{SVG}text")}
    assert not any(path.get("fill") == "none" and "L" in path.get("d") for path in drawn([]).iter(f"{SVG}path"))


def test_lines_that_cannot_be_drawn():
    for values in ([-1.0], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="series: got .*, allowed: finite"):
            drawn([Line("x", values)])
    with pytest.raises(ValueError, match="series: got 6, allowed: at most 5"):
        drawn(6 * LINES[:1])
