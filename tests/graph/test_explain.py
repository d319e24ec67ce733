"""The counts against what is counted by hand, and drawings that show every call once."""

import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import horsepower
from horsepower.drawing import svg
from horsepower.graph import provenance
from horsepower.graph.capture import capture
from horsepower.graph.diagram import Box, Diagram, diagram, groups_of
from horsepower.graph.explain import Work, block_of, measure
from horsepower.graph.passes import PASSES
from models import DYNAMIC, TINY, random_inputs, random_model

FIVE = replace(TINY, num_layers=5, mm_layers=(0, 4), gelu7_layers=(0,))


@cache
def compiled(config):
    model = random_model(config)
    captured = capture(model, (*random_inputs(config, 3, 2, 5, 4), 3), dynamic_shapes=DYNAMIC)
    graph = provenance.snapshot(captured)
    return captured, graph, provenance.rewrite(graph, PASSES)


def explained(config=FIVE, sizes=(4, 7, 5, 3)):
    inputs = [x.to("meta") for x in random_inputs(config, *sizes)]
    return measure(*compiled(config), [*inputs, sizes[0]])


def test_equal_blocks_are_one_kind():
    kinds = explained().kinds
    assert [kind.name for kind in kinds] == [
        "block.layers 0",
        "block.layers 1-3",
        "block.layers 4",
        "around the blocks",
    ]
    names = {fusion.rewrite: fusion for fusion in kinds[1].fusions}
    assert names["fuse_qkv"].kernels == ("linear", "qk_norm_rope")
    assert names["fuse_qkv"].count == 3
    assert dict(names["fuse_qkv"].replaced)["aten.mul"] == 8
    assert names["fuse_gate"].kernels == ("attention",)
    assert ("aten.scaled_dot_product_attention", 1) in names["fuse_gate"].replaced


def test_totals_are_the_sum_of_the_kinds():
    found = explained()
    assert sum((kind.before for kind in found.kinds), Work()) == found.before
    assert sum((kind.after for kind in found.kinds), Work()) == found.after
    assert found.after.calls < found.before.calls / 4
    assert found.after.bytes < found.before.bytes / 2
    assert 0 < found.peak_after < found.peak_before


def test_calls_are_those_of_the_plan():
    _, graph, _ = compiled(FIVE)
    ours = [n for n in graph.nodes.nodes if str(n.target).startswith("horsepower.")]
    in_blocks = [n for n in ours if block_of(n.meta["module"]) == "block.layers.2"]
    (kind,) = [kind for kind in explained().kinds if kind.name == "block.layers 1-3"]
    assert kind.after.calls == 3 * len(in_blocks) == 3 * 9


def test_what_was_refused_is_said_with_the_reason():
    (refusal,) = explained().refused
    assert (refusal.rewrite, refusal.reason, len(refusal.modules)) == ("raise_linear", "it has a bias", 3)


class Chain(nn.Module):
    """Two blocks of one kind: a product and a square root."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x.sqrt()[1:]


def test_a_foreign_model_counted_by_hand():
    x = torch.rand(5, 8)
    captured = capture(Chain(), (x,))
    graph = provenance.snapshot(captured)
    found = measure(captured, graph, provenance.rewrite(graph, PASSES), [x])
    inside, around = found.kinds
    # products: 2 x 5 x 8 x 8; read 5 x 8 and 8 x 8, write 5 x 8 floats
    product = Work(1, 640, 4 * (40 + 64 + 40))
    assert (inside.name, inside.before, inside.after) == ("steps 0-1", product + product, product + product)
    assert around.before == around.after == Work(1, 40, 4 * 80)  # the slice moves nothing
    assert found.peak_before == found.peak_after == 4 * 80
    assert found.load == 0
    assert inside.fusions[0].replaced == (("aten.linear", 1),)


class Products(nn.Module):
    def forward(self, q, k):
        scores = torch.bmm(q, k.transpose(1, 2))
        return torch.matmul(scores, k).softmax(-1), torch.addmm(q[0], q[0], k[0].t() @ k[0])


def test_other_products_are_counted_too():
    q, k = torch.rand(3, 5, 8), torch.rand(3, 5, 8)
    captured = capture(Products(), (q, k))
    graph = provenance.snapshot(captured)
    found = measure(captured, graph, provenance.rewrite(graph, PASSES), [q, k])
    bmm = matmul = 2 * 3 * 5 * 5 * 8
    assert found.before.flops == bmm + matmul + 4 * 3 * 5 * 8 + 2 * 8 * 8 * 5 + 2 * 5 * 8 * 8


def test_a_window_costs_what_it_sees():
    """The same model full and windowed: attention is all that differs."""
    config, frames = replace(TINY, local_attn_layers=(0, 1, 2), frame_receptive_field=1), 6
    found, full = explained(config, (frames, 10, 5, 3)), explained(TINY, (frames, 10, 5, 3))
    rows = frames * 10 + 8
    seen = sum((min(frames, i + 2) - max(0, i - 1)) * 10 + 8 for i in range(frames)) * 10 + 8 * rows
    saved = 4 * (rows * rows - seen) * TINY.hidden_size * 3
    assert full.before.flops - found.before.flops == saved
    assert full.after.flops - found.after.flops == saved


@pytest.mark.parametrize(
    ("module", "block"),
    [("block.layers.4.mlp", "block.layers.4"), ("layers.0", "layers.0"), ("0.1.x", "0"), ("adapter", ""), ("l2.x", "")],
)
def test_the_block_of_a_module(module, block):
    assert block_of(module) == block


def test_the_drawing_of_a_block():
    captured, graph, _ = compiled(FIVE)
    before, after = groups_of(provenance.regions(captured, graph))
    drawn = diagram(graph, "block.layers.2", after)
    inside = [box for box in drawn.boxes if not box.title.startswith("from ")]
    assert [box.title for box in inside] == [
        "linear", "add_rms_norm", "linear", "qk_norm_rope", "attention", "linear", "add_rms_norm", "linear",
        "activation",
    ]  # fmt: skip
    assert inside[3].detail == "q_norm.weight, k_norm.weight"
    assert all(a < b for a, b in drawn.edges)
    eager = diagram(captured, "block.layers.2", before)
    assert {box.group for box in inside} - {None} <= {box.group for box in eager.boxes} | {inside[0].group}
    root = ElementTree.fromstring(svg(eager))
    rects = [each for each in root.iter() if each.tag.endswith("rect")]
    assert len(rects) == len(eager.boxes)
    assert len([each for each in root.iter() if each.tag.endswith("path")]) == len(eager.edges)
    places = sorted((float(r.get("y")), float(r.get("x")), float(r.get("width"))) for r in rects)
    for (y, x, width), (next_y, next_x, _) in pairwise(places):
        assert y != next_y or x + width < next_x  # no box covers another


def test_a_drawing_escapes_names_and_refuses_nothing_to_draw():
    drawn = svg(Diagram((Box("a<b"), Box("c", "d & e", 1)), ((0, 1),)))
    assert "a&lt;b" in drawn
    assert "d &amp; e" in drawn
    with pytest.raises(ValueError, match="diagram: got no boxes"):
        svg(Diagram((), ()))


def test_a_report_on_any_module():
    report = horsepower.explain(Chain(), (torch.rand(5, 8),))
    text = report.text()
    assert "2 blocks of 1 kind, 1 of them traced" in text
    assert re.search(r"kernel calls +3 +3", text)
    assert "Nothing that canonicalise, hoist" in text
    page = report.html()
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)=|https?://|<script", page)
