"""What is raised beside the model family's own forms, and what is left for which reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from horsepower.graph import passes
from horsepower.graph.capture import capture
from horsepower.graph.passes.raise_mask import LARGEST
from sites import BF16, COLUMNS, Runs, attended, heads, site, values, written_out


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("weight", [True, False])
def test_a_written_out_rms_norm(dtype, weight):
    x = values(2, 5, COLUMNS, dtype=dtype)
    taken, _ = site(lambda module, x: written_out(module, x, weight), x, dtype=dtype)
    assert taken == ["raise_rms_norm"]


def test_a_gain_that_is_not_one_row_stays_beside_the_norm():
    x = values(2, COLUMNS, COLUMNS)
    taken, _ = site(lambda module, x: written_out(module, x, False) * module.weight[:, None], x)
    assert taken == ["raise_rms_norm"]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda module, x: written_out(module, x, dims=(1, 2)), "it norms more than the last dimension"),
        (lambda module, x: F.rms_norm(x, (COLUMNS,), module.weight), "it has no epsilon"),
        (lambda module, x: F.layer_norm(x, (5, COLUMNS)), "it norms more than the last dimension"),
        (lambda module, x: F.layer_norm(x.double(), (COLUMNS,), None, module.bias.double()).float(), "it has a bias"),
    ],
)
def test_what_is_left_says_why(run, reason):
    taken, refused = site(run, values(2, 5, COLUMNS))
    assert taken == []
    assert any(reason in each for each in refused)


@pytest.mark.parametrize(
    ("run", "rewrite"),
    [
        (lambda module, x: F.rms_norm(x, (COLUMNS,), None, 1e-6), "raise_rms_norm"),
        (lambda module, x: F.gelu(x), "raise_activation"),
        (lambda module, x: F.gelu(x, approximate="tanh"), "raise_activation"),
        (lambda module, x: F.silu(x), "raise_activation"),
        (lambda module, x: F.silu(x) * (x + 1), "raise_silu_mul"),
        (lambda module, x: torch.cat([F.silu(a) * b for a, b in [x.repeat(1, 1, 2).chunk(2, -1)]]), "raise_silu_mul"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_torchs_own_operators(run, rewrite, dtype):
    taken, refused = site(run, values(2, 5, COLUMNS, dtype=dtype), dtype=dtype)
    assert taken == [rewrite]
    assert set(refused) <= {"its input is not a projection of its own"}


def test_a_side_that_is_broadcast_stays_apart():
    taken, refused = site(lambda module, x: F.silu(x) * x[:, :, :1], values(2, 5, COLUMNS))
    assert taken == ["raise_activation"]
    assert "one side is broadcast" in refused


@pytest.mark.parametrize("own", [0, 1, 2])
def test_a_layer_norm(own):
    def run(module, x):
        return F.layer_norm(x, (COLUMNS,), *(module.weight, module.bias)[:own], eps=1e-6)

    assert site(run, values(2, 5, COLUMNS)) == (["raise_layer_norm"], [])
    taken, refused = site(run, values(2, 5, COLUMNS, dtype=BF16), dtype=BF16)
    assert (taken, len(refused)) == ([], 1)


def test_a_layer_norm_between_casts():
    def run(module, x):
        return F.layer_norm(x.float(), (COLUMNS,), module.weight.float(), module.bias.float()).to(x.dtype)

    assert site(run, values(2, 5, COLUMNS, dtype=BF16), dtype=BF16) == (["raise_layer_norm"], [])


@pytest.mark.parametrize("function", [F.gelu, F.silu])
def test_an_activation_between_casts(function):
    taken, _ = site(lambda module, x: function(x.float()).to(BF16), values(3, 7, dtype=BF16), dtype=BF16)
    assert taken == ["raise_activation"]


def test_a_modulated_norm_keeps_what_modulates_it():
    """adaLN: scale and shift are computed, and later than the sum that is normed."""

    def run(module, h, branch, time):
        total = h + F.linear(branch, module.weight[:, None].expand(-1, COLUMNS))
        scale, shift = (F.silu(time) * module.weight).exp(), F.silu(time) * module.bias
        return F.rms_norm(total, (COLUMNS,), module.weight, 1e-6) * (1 + scale) + shift

    taken, _ = site(run, values(5, COLUMNS), values(5, COLUMNS), values(COLUMNS))
    assert "fuse_add_norm" in taken


def test_a_gain_that_is_computed_later_than_the_sum_is_not_fused():
    def run(module, h, branch, time):
        total = h + F.linear(branch, module.weight[:, None].expand(-1, COLUMNS))
        return F.rms_norm(total, (COLUMNS,), time.exp() + module.weight, 1e-6)

    taken, refused = site(run, values(5, COLUMNS), values(5, COLUMNS), values(COLUMNS))
    assert "raise_rms_norm" in taken
    assert "fuse_add_norm" not in taken
    assert "the gain or the counts are computed later than the sum" in refused


def test_a_norm_without_a_gain_is_not_fused():
    def run(module, h, branch):
        wide = module.weight[:, None].expand(-1, COLUMNS)
        total = h + F.rms_norm(F.linear(branch, wide), (COLUMNS,), None, 1e-6)
        return F.rms_norm(F.linear(total, wide) + total, (COLUMNS,), None, 1e-6) + F.rms_norm(
            total, (COLUMNS,), module.weight, 1e-6
        )

    taken, refused = site(run, values(5, COLUMNS), values(5, COLUMNS))
    assert "fuse_add_norm" not in taken
    assert {"the norm has no gain", "neither side of the sum is a projection of its own"} <= set(refused)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("keys", [1, 6, 11])
def test_attention_over_a_batch_to_other_keys(dtype, batch, keys):
    x, y = values(batch, 6, 64, dtype=dtype), values(batch, keys, 64, dtype=dtype)
    assert site(attended(scale=0.25), x, y, dtype=dtype)[0] == ["raise_attention"]


@pytest.mark.parametrize("written", ["expand", "enable_gqa"])
def test_heads_that_share_keys(written):
    def run(module, x, y):
        q, (k, v) = heads(x, 4), (heads(z, 2) for z in (y, y * 2))
        if written == "expand":
            k, v = (z[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 4, 7, 16) for z in (k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=written == "enable_gqa")

    module, inputs = Runs(run), (values(2, 6, 64), values(2, 7, 32))
    graph = passes.run(capture(module, inputs))
    (call,) = (node for node in graph.nodes.nodes if str(node.target) == "horsepower.attention.default")
    assert [list(x.meta["val"].shape) for x in call.args[:3]] == [[2, 6, 4, 16], [2, 7, 2, 16], [2, 7, 2, 16]]
    torch.testing.assert_close(graph.run({}, *inputs), module(*inputs))


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (attended(is_causal=True), "it has a mask, a causal order or dropout"),
        (attended(scale=0.3), "its scale is not 1 / sqrt(head dim)"),
        (attended(lambda: torch.ones(6, 6, dtype=torch.bool).tril()), "it has a mask, a causal order or dropout"),
        (attended(lambda: torch.ones(6, 6, dtype=torch.bool).triu()), "the mask is neither causal nor empty"),
    ],
)
def test_attention_that_is_left_says_why(run, reason):
    taken, refused = site(run, values(2, 6, 64), values(2, 6, 64))
    assert "raise_attention" not in taken
    assert reason in refused


def test_a_gate_on_a_batch_is_not_fused():
    def run(module, x):
        q = x.unflatten(-1, (4, 16)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, q, q).transpose(1, 2)
        return out * torch.sigmoid(module.weight[:4]).unsqueeze(1)

    taken, refused = site(run, values(2, 6, 64))
    assert taken == ["raise_attention"]
    assert refused == ["the attention is over a batch"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_cast_to_another_device_stays(device):
    class Moves(nn.Module):
        def forward(self, x):
            return x.to(device, torch.bfloat16)

    graph = passes.run(capture(Moves(), (torch.ones(3),)))
    (call,) = (node for node in graph.nodes.nodes if node.op == "call_function")
    assert str(call.target) == ("aten.to.dtype" if device == "cpu" else "aten.to.device")
    assert graph.run({}, torch.ones(3)).device.type == device


def seen(kind):
    """A mask [6, 6] that is the same in every run."""
    row, column = torch.arange(6)[:, None], torch.arange(6)[None]
    if kind == "causal, added":
        return torch.zeros(6, 6).masked_fill(column > row, -torch.inf)
    return (column <= row) if kind == "causal" else (column >= 0) & (row >= 0)


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("causal", ["raise_mask"]),
        ("causal, added", ["raise_mask"]),
        ("empty", ["raise_mask", "raise_attention"]),
    ],
)
def test_a_mask_that_is_the_same_in_every_run(kind, taken):
    assert site(attended(lambda: seen(kind)), values(2, 6, 64), values(2, 6, 64))[0] == taken


def test_a_mask_that_is_given_stays():
    x = values(2, 6, 64)
    taken, refused = site(attended(lambda given: given > 0), x, x, torch.eye(6) + torch.ones(6, 6).tril())
    assert taken == []
    assert "the mask depends on what the model is given, or adds to the scores" in refused
    assert LARGEST >= 8192 * 8192
