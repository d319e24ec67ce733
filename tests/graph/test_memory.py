"""Lifetimes and the arena, as pure functions."""

import random

import pytest
import torch

from horsepower.graph.call import Call, Ref
from horsepower.graph.memory import ALIGNMENT, Block, aligned, lay_out, lifetimes, lower_bound, pack
from horsepower.graph.sizes import TensorSpec, symbol


def spec(*shape, dtype=torch.float32):
    strides, stride = [], 1
    for n in reversed(shape):
        strides.insert(0, stride)
        stride = stride * n
    return TensorSpec(shape, tuple(strides), dtype, torch.device("cpu"))


ROW = spec(16)


def call(result, target, *args, made=ROW, views=False):
    return Call(result, target, args, (), made, views, (), "")


def alive_together(a, b):
    return a.first <= b.last and b.first <= a.last


@pytest.mark.parametrize("seed", range(20))
def test_no_two_live_blocks_overlap(seed):
    generator = random.Random(seed)
    blocks = []
    for _ in range(60):
        first = generator.randrange(40)
        blocks.append(Block(generator.choice([0, 1, 64, 100, 4096, 5000]), first, first + generator.randrange(12)))
    offsets, end = pack(blocks)
    spans = [(o, o + b.bytes, b) for o, b in zip(offsets, blocks, strict=True) if b.bytes]
    for i, (start, stop, block) in enumerate(spans):
        assert start % ALIGNMENT == 0
        assert stop <= end
        for start2, stop2, other in spans[i + 1 :]:
            assert not alive_together(block, other) or stop <= start2 or stop2 <= start
    alive = [sum(aligned(b.bytes) for b in blocks if b.first <= step <= b.last) for step in range(60)]
    assert lower_bound(blocks) == max(alive) <= end


def test_memory_is_used_again():
    blocks = [Block(1000, i, i + 1) for i in range(10)]  # a chain: each is read by the next
    assert pack(blocks)[1] == 2 * aligned(1000) == lower_bound(blocks)
    assert pack([]) == ((), 0)


CHAIN = [
    call("a", "aten.relu.default", Ref("x")),
    call("b", "aten.relu.default", Ref("a")),
    call("view", "aten.view.default", Ref("a"), [4, 4], views=True),
    call("n", "aten.sym_size.int", Ref("view"), 0, made=None),
    call("parts", "horsepower.add_rms_norm.default", Ref("b"), made=(spec(16), spec(16))),
    call("sum", "_operator.getitem", Ref("parts"), 0, views=True),
    call("normed", "_operator.getitem", Ref("parts"), 1, views=True),
    call("c", "aten.relu.default", Ref("normed")),
    call("d", "aten.add.Tensor", Ref("view"), Ref("c")),
]


def test_views_keep_what_they_look_at_and_parts_live_apart():
    lives = lifetimes(CHAIN, [Ref("sum"), 3])
    assert lives == {
        (0, 0): (0, 8),  # through its view
        (1, 0): (1, 4),
        (4, 0): (4, 9),  # the output
        (4, 1): (4, 7),
        (7, 0): (7, 8),
        (8, 0): (8, 8),  # nobody reads it
    }


def test_sizes_are_asked_for_when_a_plan_is_laid_out():
    rows = symbol("video_0")
    calls = [
        call("a", "aten.relu.default", Ref("x"), made=spec(rows, 8)),
        call("b", "aten.scaled_dot_product_attention.default", Ref("a"), made=spec(2 * rows + 1)),
        call("c", "aten.relu.default", Ref("b"), made=spec(2 * rows + 1, dtype=torch.bfloat16)),
    ]
    layout = lay_out(calls, [Ref("c")], {}, {"video_0": 1000}, torch.device("cpu"), "cpu")
    assert layout.results[0, 0].spec.shape == (1000, 8)
    assert (1, 0) not in layout.results  # the operator allocates what it returns
    assert layout.arena == aligned(32000)
    assert layout.peak == layout.arena + aligned(8004)
    assert lay_out(calls, [Ref("c")], {}, {"video_0": 0}, torch.device("cpu"), "cpu").arena == ALIGNMENT
    with pytest.raises(ValueError, match="sizes: got no video_0"):
        lay_out(calls, [Ref("c")], {}, {"audio_0": 1000}, torch.device("cpu"), "cpu")
