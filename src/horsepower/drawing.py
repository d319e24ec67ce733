"""A layered drawing of a graph as one SVG element that refers to nothing outside; readable on dark and light."""

import html
from collections.abc import Sequence
from itertools import pairwise

from horsepower.graph.diagram import Box, Diagram

HEIGHT, GAP, SPACE, CHARACTER = 34, 26, 18, 6.4  # of a box; between layers; between boxes; of a letter, in pixels


def svg(diagram: Diagram) -> str:
    """Boxes of one group share a colour. Raises ValueError for a diagram without boxes."""
    if not diagram.boxes:
        raise ValueError("diagram: got no boxes, allowed: at least one")
    layers, chains = _layered(diagram)
    widths = [_width(diagram.boxes[i]) if i < len(diagram.boxes) else 2.0 for i in range(sum(map(len, layers)))]
    neighbours: list[set[int]] = [set() for _ in widths]
    for chain in chains:
        for a, b in pairwise(chain):
            neighbours[a].add(b)
            neighbours[b].add(a)
    x = _placed(layers, widths, neighbours)
    y = {i: n * (HEIGHT + GAP) for n, layer in enumerate(layers) for i in layer}
    left = min(x[i] - widths[i] / 2 for i in y)
    right = max(x[i] + widths[i] / 2 for i in y)
    body = [_edge([(x[i] - left, float(y[i])) for i in chain]) for chain in chains]
    body += [_box(box, x[i] - left, y[i], widths[i]) for i, box in enumerate(diagram.boxes)]
    width, height = right - left, len(layers) * (HEIGHT + GAP) - GAP
    return (
        f'<svg viewBox="-2 -2 {width + 4:.0f} {height + 4}" width="{width + 4:.0f}" fill="none" stroke="currentColor" '
        f'font-family="system-ui, sans-serif" font-size="11" text-anchor="middle">{"".join(body)}</svg>'
    )


def _layered(diagram: Diagram) -> tuple[list[list[int]], list[list[int]]]:
    """Boxes by their longest way from a source; each edge as a chain with a point in every layer that it crosses."""
    count = len(diagram.boxes)
    depth = [0] * count
    for a, b in sorted(diagram.edges, key=lambda edge: edge[1]):
        depth[b] = max(depth[b], depth[a] + 1)
    for i in range(count):  # what comes from outside is drawn just above who reads it first
        readers = [b for a, b in diagram.edges if a == i]
        if readers and all(b != i for _, b in diagram.edges):
            depth[i] = min(depth[b] for b in readers) - 1
    layers: list[list[int]] = [[] for _ in range(max(depth) + 1)]
    for i in range(count):
        layers[depth[i]].append(i)
    chains = []
    for a, b in diagram.edges:
        points = range(count, count + depth[b] - depth[a] - 1)
        for n, point in enumerate(points):
            layers[depth[a] + 1 + n].append(point)
        count += len(points)
        chains.append([a, *points, b])
    return layers, chains


def _placed(layers: list[list[int]], widths: Sequence[float], neighbours: Sequence[set[int]]) -> dict[int, float]:
    """The middle of each box: sweeps down and up pull it towards its neighbours, in their order."""
    x: dict[int, float] = {}
    for layer in layers:
        _pack(layer, {i: float(n) for n, i in enumerate(layer)}, widths, x)
    for sweep in range(12):
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            wanted = {
                i: sum(x[j] for j in neighbours[i]) / len(neighbours[i]) if neighbours[i] else x[i] for i in layer
            }
            layer.sort(key=wanted.__getitem__)
            _pack(layer, wanted, widths, x)
    return x


def _pack(layer: Sequence[int], wanted: dict[int, float], widths: Sequence[float], x: dict[int, float]) -> None:
    """As near to where each box wants to be as its neighbours in the layer allow."""
    for n, i in enumerate(layer):
        before = x[layer[n - 1]] + (widths[layer[n - 1]] + widths[i]) / 2 + SPACE if n else wanted[i]
        x[i] = max(wanted[i], before)
    shift = sum(wanted[i] - x[i] for i in layer) / max(1, len(layer))
    for i in layer:
        x[i] += shift


def _width(box: Box) -> float:
    return max(len(box.title), len(box.detail)) * CHARACTER + 14


def _edge(points: Sequence[tuple[float, float]]) -> str:
    """From below the first box through the middle of every layer to the top of the last."""
    (x, y), parts = points[0], []
    y += HEIGHT
    parts.append(f"M{x:.0f} {y:.0f}")
    for n, (to_x, to_y) in enumerate(points[1:], 1):
        middle = (y + to_y) / 2
        parts.append(f"C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}")
        x, y = to_x, to_y
        if n < len(points) - 1:
            parts.append(f"V{y + HEIGHT:.0f}")
            y += HEIGHT
    return f'<path d="{"".join(parts)}" opacity=".45"/>'


def _box(box: Box, x: float, y: float, width: float) -> str:
    outside = box.title.startswith("from ")
    fill = "none" if box.group is None else f"hsla({box.group * 67 % 360}, 70%, 50%, .25)"
    rows = (y + 14, y + 27) if box.detail else (y + 21,)
    texts = zip(rows, (box.title, box.detail), strict=False)
    lines = "".join(f'<text x="{x:.0f}" y="{row:.0f}">{html.escape(text)}</text>' for row, text in texts)
    dashes = ' stroke-dasharray="3 3"' if outside else ""
    place = f'x="{x - width / 2:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HEIGHT}"'
    return f'<rect {place} rx="5" fill="{fill}"{dashes}/><g fill="currentColor" stroke="none">{lines}</g>'
