"""Capture: one graph of the whole model, equal blocks traced once, errors that say where."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from horsepower.graph import repeats
from horsepower.graph.capture import CaptureError, capture
from horsepower.runtime.executor import weights_of
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.presets import FOAL
from models import DYNAMIC, TINY, VARIANTS, random_inputs, random_model, variant

LENGTHS = [(3, 2, 5, 4), (4, 7, 1, 1), (1, 1, 1, 0), (2, 3, 0, 6), (1, 5, 0, 0), (5, 1, 13, 0)]


def traced(config):
    model = random_model(config)
    return model, capture(model, (*random_inputs(config, 3, 2, 5, 4), 3), dynamic_shapes=DYNAMIC)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_graph_computes_the_model_at_lengths_never_seen(name):
    model, graph = traced(variant(name))
    for frames, tokens, audio, text in LENGTHS:
        inputs = (*random_inputs(model.config, frames, tokens, audio, text), frames)
        with torch.no_grad():
            for got, want in zip(graph.run(weights_of(model), *inputs), model(*inputs), strict=True):
                assert torch.equal(got, want)


def test_three_kinds_of_forty_layers_are_traced_without_memory():
    model = DiT(FOAL, device="meta").eval()
    inputs = [x.to("meta") for x in random_inputs(FOAL, 3, 2, 5, 4)]
    graph = capture(model, (*inputs, 3), dynamic_shapes=DYNAMIC)
    assert graph.traced == 3
    read = {str(node.target) for node in graph.nodes.nodes if node.op == "get_attr" and node.users}
    assert read == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    attentions = [n for n in graph.nodes.nodes if "scaled_dot_product" in str(n.target)]
    assert [n.meta["module"] for n in attentions] == [f"block.layers.{i}.attention" for i in range(40)]


def test_a_stage_is_captured_by_its_method():
    model = random_model(TINY)
    *parts, coords = random_inputs(TINY, 3, 2, 5, 4)
    with torch.no_grad():
        condition = model.condition(parts[2], coords)
        graph = capture(model, (parts[0], parts[1], condition, 3), method="velocity")
        want = model.velocity(parts[0], parts[1], condition, 3)
        got = graph.run(weights_of(model), parts[0], parts[1], condition, 3)
    assert all(map(torch.equal, got, want))
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.block.layers[1])


class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x + self.calls


def test_a_branch_on_a_value_names_its_line():
    with pytest.raises(CaptureError, match=r"Branches cannot be captured.*test_capture\.py:\d+.*custom_op"):
        capture(Branches(), (torch.ones(3),))


def test_a_module_that_changes_itself_is_refused():
    with pytest.raises(CaptureError, match=r"aten\.add_\.Tensor: changes a tensor in place .*self\.calls\.add_\(1\)"):
        capture(Counts(), (torch.ones(3),))


class Block(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale, self.inner = scale, nn.Linear(4, 4)

    def forward(self, x, y=None, flip=False):
        x = self.inner(x) * self.scale
        return (x, y) if y is not None else x.flip(0) if flip else x


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x, flip=i % 2 == 1)
        return x


class Pairs(Stack):
    def forward(self, x):
        y = x
        for block in self.blocks:
            x, y = block(x, y=y)
            x, y = y, x
        return x - y


class Nothing(Stack):
    """Blocks that return None beside a tensor: no kind of them is marked."""

    def __init__(self, *blocks):
        super().__init__(*map(WithNone, blocks))

    def forward(self, x):
        for block in self.blocks:
            x, none = block(x)
            assert none is None
        return x


class WithNone(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x), None


@pytest.mark.parametrize(("stack", "kinds"), [(Stack, 2), (Pairs, 1), (Nothing, 0)])
def test_blocks_with_keywords_and_several_results(stack, kinds):
    torch.manual_seed(0)
    module, x = stack(*(Block() for _ in range(5))), torch.randn(3, 4)
    graph = capture(module, (x,))
    assert graph.traced == kinds
    with torch.no_grad():
        assert torch.equal(graph.run(weights_of(module), x), module(x))


class Notes(nn.Module):
    """Writes what it computed where its caller finds it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, notes):
        y = self.inner(x)
        if isinstance(notes, Box):
            notes.total = notes.total + y
        elif isinstance(notes, dict):
            notes["total"] = notes.get("total", 0) + y
        elif isinstance(notes, tuple):
            notes[0].append(y)
        else:
            notes.append(y)
        return x + y


class Box:
    def __init__(self):
        self.total = 0


class Noted(Stack):
    def __init__(self, make, keyword):
        super().__init__(*(Notes() for _ in range(3)))
        self.make, self.keyword = make, keyword

    def forward(self, x):
        notes = self.make()
        for block in self.blocks:
            x = block(x, notes=notes) if self.keyword else block(x, notes)
        found = notes[0] if isinstance(notes, tuple) else notes
        parts = [found.total] if isinstance(found, Box) else found.values() if isinstance(found, dict) else found
        return x + sum(parts)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("make", [list, dict, Box, lambda: ([],)])
def test_blocks_that_write_into_an_argument_are_traced_each(make, keyword):
    torch.manual_seed(0)
    module, x = Noted(make, keyword), torch.randn(3, 4)
    graph = capture(module, (x,))
    assert graph.traced == 0
    with torch.no_grad():
        assert torch.equal(graph.run(weights_of(module), x), module(x))


class Both(NamedTuple):
    x: torch.Tensor
    times: tuple[int, torch.Tensor]


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, both):
        return Both(self.inner(both.x) * both.times[0] + both.times[1], both.times[1:] + both.times[1:])


class SeveralStack(Stack):
    def forward(self, x):
        for block in self.blocks:
            x = block(Both(x, (2, x.sin()))).x
        return x


def test_blocks_that_take_tuples_are_traced_once():
    torch.manual_seed(0)
    module, x = SeveralStack(*(Several() for _ in range(3))), torch.randn(3, 4)
    graph = capture(module, (x,))
    assert graph.traced == 1
    with torch.no_grad():
        assert torch.equal(graph.run(weights_of(module), x), module(x))


def test_blocks_that_differ_are_not_one_kind():
    shared = nn.Linear(4, 4)
    hooked, tied, twin = Block(), Block(), Block()
    hooked.register_forward_hook(lambda *_: None)
    tied.inner = twin.inner = shared
    stack = Stack(Block(), Block(), Block(2.0), hooked, tied, twin, Block().to(torch.bfloat16))
    assert set(repeats.find(stack)) == {"blocks.0", "blocks.1"}
    with torch.no_grad():
        x = torch.randn(2, 4)
        own = Stack(*stack.blocks[:6])
        graph = capture(own, (x,))
        assert torch.equal(graph.run(weights_of(own), x), own(x))
