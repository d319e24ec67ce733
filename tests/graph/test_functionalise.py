"""Changes in place: the graph computes what the module does, or says which line it does not understand."""

import pytest
import torch
from torch import nn

from horsepower.graph.capture import CaptureError, capture
from horsepower.runtime.executor import weights_of


def added(x):
    y = x * 2
    y += x
    y.mul_(y)
    return y - x


def parts(x):
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 1::2]
    out[..., 1::2] = -x[..., 0::2]
    return out


def seen_through_other_views(x):
    y = x.clone()
    row, column, flat, turned = y[1], y[:, 2], y.view(-1), y.T
    row += 10
    turned[0] *= 3
    flat[5].fill_(7)
    column.copy_(row[:1])
    return y, row, column, flat, turned, y[1] * 2


def views_of_views(x):
    y = x.clone()
    y.unflatten(1, (3, 2)).transpose(0, 1).permute(2, 0, 1)[1, 1:, ::2].squeeze(0).unsqueeze(0).add_(100)
    return y


def split_parts(x):
    y, z, w = x.clone(), x.clone(), x.clone()
    y.chunk(3, dim=1)[1].zero_()
    first, second = z.split((2, 4), 1)
    second *= first[:, :1]
    w.unbind(0)[2].neg_()
    return y, z, w, first, second


def narrowed(x):
    y = x.to(torch.bfloat16)
    y += x  # the sum is rounded to bfloat16
    return y


def kept_strides(x):
    y = torch.empty(6, 4, dtype=x.dtype)
    y.copy_(x.T)
    return y.view(-1), y


def copied_before_its_source_changes(x):
    source, y, z = x * 2, torch.empty_like(x), torch.empty_like(x)
    y.copy_(source)
    z[1:] = source[1:]
    z[:1] = 0
    source.add_(1)
    y[0] *= 3
    return source, y, z


def by_mask(x):
    y = x.clone()
    y.masked_fill_(x > 0, -1.0).clamp_(max=0.5)
    y[x < -1] = 5
    return y


def by_index(x):
    y = x.clone()
    y[torch.tensor([0, 2])] += 1
    return y


def made_while_traced(x):
    mark = torch.tensor([1.0, 2.0])
    mark += 1
    return x[:, :2] * mark, torch.tensor([1.0, 2.0]) * 1


def after_dropout(x):
    y = x * 1
    z = torch.dropout(y, 0.5, False)  # y itself
    z += 1
    return y


def in_a_loop(x):
    total = torch.zeros_like(x)
    for i in range(3):
        total[i : i + 2] += x[i : i + 2] * i
        total = total * 2
    return total


class Runs(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


CASES = [
    added, parts, copied_before_its_source_changes, seen_through_other_views, views_of_views, split_parts, narrowed,
    kept_strides, by_mask, by_index,
    made_while_traced, after_dropout, in_a_loop,
]  # fmt: skip


@pytest.mark.parametrize("run", CASES, ids=lambda run: run.__name__)
def test_the_graph_computes_what_the_module_does(run):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    given = x.clone()
    graph = capture(Runs(run), (torch.ones(4, 6),))
    got, want = graph.run({}, x), run(x)
    assert torch.equal(x, given)
    for a, b in zip(*((y,) if isinstance(y, torch.Tensor) else y for y in (got, want)), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("run", [added, parts, in_a_loop], ids=lambda run: run.__name__)
def test_at_lengths_never_seen(run):
    graph = capture(Runs(run), (torch.ones(5, 6),), dynamic_shapes=(({0: torch.export.Dim.DYNAMIC}),))
    for rows in (4, 9):
        x = torch.randn(rows, 6)
        assert torch.equal(graph.run({}, x), run(x))


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        x += self.inner(x)
        return x


class Accumulates(nn.Module):
    """Its blocks change what they are given, and it reads that afterwards."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Adds() for _ in range(3))

    def forward(self, x):
        first = x * 1
        h = first
        for block in self.blocks:
            h = block(h)
        h *= 2
        return first + h


def test_a_block_that_changes_what_it_is_given():
    torch.manual_seed(0)
    module, x = Accumulates(), torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(capture(module, (x,)).run(weights_of(module), x), module(x))


class ChangesItsInput(nn.Module):
    def forward(self, x):
        x[:, 0] = 0
        return x + 1


class ChangesAnExpandedView(nn.Module):
    def forward(self, x):
        y = x[:, :1].clone().expand(4, 6)
        y[:, :1].add_(1)
        return y


class Draws(nn.Module):
    def forward(self, x):
        y = x * 1
        y.normal_()
        return y


class SharesUnseen(nn.Module):
    def forward(self, x):
        y = torch.arange(3.0)
        a, b = torch.meshgrid(y, y * 1, indexing="ij")
        y += 1
        return a + b + x[0, 0]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (ChangesItsInput, r"x\[:, 0\] = 0\): x is an input"),
        (ChangesAnExpandedView, r"y\[:, :1\]\.add_\(1\)\): it is an expanded view"),
        (Draws, r"y\.normal_\(\)\): no operator returns it as a new value"),
        (SharesUnseen, r"y \+= 1\): .* shares its memory"),
    ],
)
def test_what_is_not_understood_names_its_line(module, reason):
    with pytest.raises(CaptureError, match=rf"changes a tensor in place \(.*{reason}.*, allowed: a new tensor"):
        capture(module(), (torch.ones(4, 6),))


class Modes(nn.Module):
    def __init__(self, low):
        super().__init__()
        self.low, self.inner = low, nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.low):
            x = self.inner(x)
            with torch.enable_grad():
                x = x * 2
        return x + 1


def test_a_grad_mode_and_a_disabled_autocast_change_nothing():
    module, x = Modes(False), torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(capture(module, (x,)).run(weights_of(module), x), module(x))


def test_autocast_is_refused_with_its_line():
    with pytest.raises(CaptureError, match=r"autocast: got torch\.bfloat16 \(.*self\.inner\(x\).*casts"):
        capture(Modes(True), (torch.ones(3, 4),))
