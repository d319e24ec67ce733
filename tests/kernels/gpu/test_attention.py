"""The Triton kernel against float64 on hostile shapes and values: on a GPU, or else in Triton's interpreter."""

from itertools import count

import pytest
import torch

from exactness import check_codes, check_exactness
from gpu import DEVICE, check
from horsepower.kernels.attention import ATTENTION
from horsepower.kernels.float8 import E4M3, codes_of
from horsepower.kernels.gpu import attention
from horsepower.kernels.gpu.launch import Config
from horsepower.kernels.ops import ops

F32, F16 = torch.float32, torch.float16
FULL = (1, [], 1, 0, -1)  # experts, counts, frames, video, window
TMA, POINTERS = (Config(4, 2, {"BLOCK_M": 16, "BLOCK_N": 16, "TMA": tma}) for tma in (1, 0))
SEEDS = count()


def inputs(rows, heads=4, kv_heads=2, dim=16, dtype=F16, gate=None, keys=None):
    """q, k and v are columns of projections; gate: None or its shape."""
    generator = torch.Generator().manual_seed(next(SEEDS))
    projection = torch.randn(max(rows, keys or rows), (heads + 2 * kv_heads) * dim + 16, generator=generator)
    q, k, v = projection[:, :-16].to(DEVICE, dtype).unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
    gate = None if gate is None else torch.randn(gate, generator=generator).to(DEVICE)
    return [q[:rows], k[: keys or rows], v[: keys or rows], gate]


def check_float32(*arguments, config=TMA):
    """To the last bits: roundings to float16 hide nothing. (For speed's sake alone, `supports` refuses float32.)"""
    out = ATTENTION.outputs(*arguments)
    out[0].fill_(torch.nan)
    attention.run(out, None, *arguments, config=config)
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]
    check_exactness(out[0], ATTENTION.reference(*arguments)[0], ATTENTION.reference(*wide)[0])


@pytest.mark.parametrize("config", [TMA, POINTERS], ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(0, 3), (1, 1), (1, 37), (33, 1), (16, 32), (37, 17)])
def test_lengths(config, rows, keys):
    check(ATTENTION, attention, *inputs(rows, keys=keys, gate=(rows, 4)), *FULL, config=config)
    check_float32(*inputs(rows, keys=keys, dtype=F32), *FULL, config=config)


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 128, 144])
def test_head_dims(dim):
    """Those that are no power of two stand side by side: what lies beyond a head's end is the next head."""
    check(ATTENTION, attention, *inputs(19, dim=dim), *FULL, config=TMA)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (5, 1), (6, 2)])
def test_heads(heads, kv_heads):
    check_float32(*inputs(21, heads, kv_heads, dtype=F32), *FULL)


@pytest.mark.parametrize("config", [TMA, POINTERS], ids=str)
@pytest.mark.parametrize(
    ("shape", "experts", "counts"),
    [
        ((20, 4), 1, []),
        ((20, 4), 3, [10, 5, 5]),
        ((4,), 1, []),
        ((12,), 3, [10, 7, 3]),
        ((12,), 3, [0, 0, 20]),
        ((12,), 3, [0, 20, 0]),
        ((12,), 3, [19, 0, 1]),
    ],
)
def test_gates(config, shape, experts, counts):
    check_float32(*inputs(20, dtype=F32, gate=shape), experts, counts, 1, 0, -1, config=config)


def test_gates_in_bfloat16_and_far_out():
    q, k, v, _ = inputs(3)
    gate = torch.tensor([[-200.0, 200.0, 0.0, -8.0]], dtype=torch.bfloat16, device=DEVICE).expand(3, 4)
    out = check(ATTENTION, attention, q, k, v, gate, *FULL, config=TMA)[0]
    assert (out[:, 0] == 0).all()


@pytest.mark.parametrize("config", [TMA, POINTERS], ids=str)
@pytest.mark.parametrize("window", [0, 1, 11])
@pytest.mark.parametrize(
    ("frames", "tokens", "rest"), [(1, 7, 5), (3, 1, 2), (5, 13, 9), (3, 16, 0), (4, 16, 17), (26, 2, 1), (4, 0, 6)]
)
def test_windows(config, window, frames, tokens, rest):
    """Frames smaller and larger than tiles; edges on those of tiles and beside them; tiles of several modalities."""
    video = frames * tokens
    arguments = inputs(video + rest, 2, 1, dtype=F32, gate=(6,))
    check_float32(*arguments, 3, [video, rest // 2, rest - rest // 2], frames, video, window, config=config)


def test_tiles_within_the_window_and_at_its_edges():
    check_float32(*inputs(5 * 40 + 35, 1, 1, dtype=F32), 1, [], 5, 200, 1)


@pytest.mark.parametrize("config", [TMA, POINTERS], ids=str)
def test_any_strides_of_rows_and_heads(config):
    q, k, v, _ = inputs(40, 6, 2, 32)
    gate = inputs(40, gate=(40, 16))[3]
    check(ATTENTION, attention, q[::2, ::3, :16], k[1::2, :, 16:], v[:20, :, :16], gate[::2, 2:4], *FULL, config=config)
    turned = v.transpose(0, 1).contiguous().transpose(0, 1)
    shifted = torch.cat([k.flatten(1)[:, :5], k.flatten(1)], 1)[:, 5:].unflatten(1, k.shape[1:])
    spread = q[:1].expand(q.shape)
    check(ATTENTION, attention, spread, shifted, turned, gate[:, :6], *FULL, config=config)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e15])
def test_tiny_and_huge_scores(scale):
    q, *rest = inputs(37, 2, 1, dtype=F32)
    check_float32(q * scale, *rest, *FULL)


def test_one_key_that_dominates_in_the_last_tile_and_in_the_first():
    q, k, v, _ = inputs(50, 2, 1, dtype=F32)
    for key in (0, 49):
        k = k.clone()
        k[key] = 100.0
        check_float32(q.abs(), k, v, None, *FULL)


def test_scores_that_overflow_downwards_weigh_nothing():
    q, k, v, _ = inputs(40, 2, 1, dtype=F32)
    q, k = torch.full_like(q, 1e30), torch.zeros_like(k)
    k[:35] = -1e30
    out = ATTENTION.outputs(q, k, v, None, *FULL)
    attention.run(out, None, q, k, v, None, *FULL, config=TMA)
    torch.testing.assert_close(out[0], v[35:].mean(0).expand(q.shape))


def test_scores_far_below_zero():
    """What is masked is lower still."""
    q, k, v, _ = inputs(37, 2, 1, dtype=F32)
    check_float32(torch.full_like(q, 30.0), torch.full_like(k, -30.0), v, None, *FULL)


def test_values_of_one_number_come_back():
    q, k, v, _ = inputs(50, 2, 1, dtype=F32)
    out = ATTENTION.outputs(q, k, v, None, 1, [], 4, 40, 0)
    attention.run(out, None, q, k, torch.full_like(v, 0.7), None, 1, [], 4, 40, 0, config=TMA)
    torch.testing.assert_close(out[0], torch.full_like(q, 0.7), rtol=1e-6, atol=0)


def test_a_query_that_is_not_finite_stays_in_its_row():
    q, k, v, _ = inputs(29, dtype=F32)
    q = q.clone()
    q[11, 2, 3] = torch.nan
    out = ATTENTION.outputs(q, k, v, None, *FULL)
    attention.run(out, None, q, k, v, None, *FULL, config=TMA)
    finite = out[0].isfinite().all(-1)
    assert not finite[11, 2]
    assert finite.sum() == finite.numel() - 1


def test_rows_of_a_window_see_nothing_else():
    """Other keys and values may be anything that is finite."""
    q, k, v, _ = inputs(5 * 7 + 4, 2, 1, dtype=F32)
    rest = (1, [], 5, 35, 1)
    outputs = []
    for value in (1e4, -1e4):
        k, v = k.clone(), v.clone()
        k[14:21], v[14:21] = value, value  # the third frame
        out = ATTENTION.outputs(q, k, v, None, *rest)
        attention.run(out, None, q, k, v, None, *rest, config=TMA)
        outputs.append(out[0])
    same = (outputs[0] == outputs[1]).all(-1).all(-1)
    assert same.tolist() == [True] * 7 + [False] * 21 + [True] * 7 + [False] * 4


def test_other_keys_and_a_batch():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 18, 4, 16), (2, 5, 2, 16), (2, 5, 2, 16))
    q, k, v = (torch.randn(*shape, generator=generator).to(DEVICE, F16) for shape in shapes)
    check(ATTENTION, attention, q, k, v, None, *FULL, config=TMA)


def test_the_default_configuration():
    check(ATTENTION, attention, *inputs(130, 1, 1, 64), 1, [], 2, 64, 0)


def test_what_the_kernel_refuses():
    q, k, v, gate = inputs(6, gate=(6, 4))
    assert attention.supports(q, k, v, gate, *FULL) is None
    assert "neither bfloat16 nor float16" in attention.supports(q.float(), k.float(), v.float(), gate, *FULL)
    assert attention.supports(q, k, v, gate.double(), *FULL) == "the gate is float64"
    assert attention.supports(q, k[:0], v[:0], None, *FULL) == "there are no keys"
    turned = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert attention.supports(q, k, turned, gate, *FULL) == "the last dimension is not contiguous"
    for dim in (8, 24, 272):
        assert attention.supports(*inputs(2, dim=dim), *FULL) == f"head dimension {dim}, not a multiple of 16 up to 256"


def check_as_codes(*arguments, inverse, config):
    """The result in float32, times `inverse`, to the nearest code."""
    out = ATTENTION.outputs(*arguments, inverse)
    out[0].view(torch.uint8).fill_(0x7F)
    attention.run(out, None, *arguments, inverse, config=config)
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]
    check_codes(out[0], ATTENTION.reference(*wide)[0] * inverse.double())
    return out[0].float()


@pytest.mark.parametrize("config", [TMA, POINTERS], ids=str)
def test_results_leave_as_codes(config):
    inverse = torch.tensor([300.0], device=DEVICE)
    check_as_codes(*inputs(37, dtype=F32, gate=(37, 4)), *FULL, inverse=inverse, config=config)
    check_as_codes(*inputs(44, 2, 1, dtype=F32), 1, [], 5, 35, 1, inverse=inverse, config=config)


def test_what_is_too_large_for_a_code_saturates():
    q, k, v, _ = inputs(20, dtype=F32)
    v[:, 0, 0] = torch.nan
    got = check_as_codes(q, k, 100 * v, None, *FULL, inverse=torch.tensor([1000.0], device=DEVICE), config=TMA)
    assert (got.abs() == 448).any()
    assert got.isnan().any()


CODES = [Config(4, 2, {"BLOCK_M": 16, "BLOCK_N": keys, "TMA": 1}, "fp8") for keys in (16, 32)]


def of_codes(rows, heads=4, kv_heads=2, dim=32, gate=None, keys=None):
    """Codes of q, k and turned v, the gate, their scales; and what the codes stand for, in float64."""
    q, k, v, gate = inputs(rows, heads, kv_heads, dim, F32, gate, keys)
    scales = [2.0**-6, 2.0**-5, 2.0**-7]
    q, k, v = (codes_of(x, 1 / scale) for x, scale in zip((q, k, v), scales, strict=True))
    exact = [x.double() * scale for x, scale in zip((q, k, v), scales, strict=True)]
    q, k, turned = q.contiguous(), k.contiguous(), ops.transpose_to_codes(v.float(), torch.ones(1, device=DEVICE))
    return [q, k, turned, gate], torch.tensor([2.0**-11, 2.0**-7], device=DEVICE), [*exact, gate]


def check_of_codes(*arguments, rest=FULL, config=CODES[0], **shape):
    """As near to float64 as the reference, both in float32 sums, whose tiles round their weights apart."""
    given, scales, exact = of_codes(*arguments, **shape)
    assert attention.supports(*given, *rest, None, scales) is None
    out = ATTENTION.outputs(*given, *rest, None, scales)
    out[0].fill_(torch.nan)
    attention.run(out, None, *given, *rest, None, scales, config=config)
    want, near = ATTENTION.reference(*exact, *rest)[0], ATTENTION.reference(*given, *rest, None, scales)[0]
    if want.numel():
        one, other = (float((x.double() - want).norm() / want.norm()) for x in (out[0], near))
        assert one <= 1.2 * other + 2.0**-8 < 0.05
    return given, scales, out[0]


@pytest.mark.parametrize("config", CODES, ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(0, 3), (1, 1), (1, 37), (33, 1), (16, 32), (37, 17), (40, 131)])
def test_lengths_of_codes(config, rows, keys):
    check_of_codes(rows, keys=keys, gate=(rows, 4), config=config)


@pytest.mark.parametrize("config", CODES, ids=str)
@pytest.mark.parametrize("window", [0, 1, 11])
@pytest.mark.parametrize(
    ("frames", "tokens", "rest"),
    [(1, 7, 5), (3, 1, 2), (5, 13, 9), (3, 16, 0), (4, 16, 17), (26, 2, 1), (4, 0, 6), (5, 37, 3), (3, 39, 40)],
)
def test_windows_of_codes(config, window, frames, tokens, rest):
    """Tiles of turned values begin at multiples of 16 tokens, wherever frames do."""
    video = frames * tokens
    counts = [video, rest // 2, rest - rest // 2]
    check_of_codes(video + rest, 2, 1, gate=(6,), rest=(3, counts, frames, video, window), config=config)


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_heads_of_codes(dim):
    check_of_codes(130, 5, 1, dim, config=None)


def test_codes_of_codes():
    given, scales, made = check_of_codes(44, 2, 1, rest=(1, [], 5, 35, 1))
    inverse = torch.tensor([40.0], device=DEVICE)
    out = ATTENTION.outputs(*given, 1, [], 5, 35, 1, inverse, scales)
    out[0].view(torch.uint8).fill_(0x7F)
    attention.run(out, None, *given, 1, [], 5, 35, 1, inverse, scales, config=CODES[0])
    torch.testing.assert_close(out[0].float() / 40, made.float(), rtol=0.07, atol=1e-3)


def test_keys_of_codes_that_dominate_in_the_first_tile_and_in_the_last():
    (q, k, v, _), scales, _ = of_codes(50, 2, 1)
    for key in (0, 49):
        k[:] = 0
        k[key] = 448
        out = ATTENTION.outputs(q, k, v, None, *FULL, None, 64 * scales)
        attention.run(out, None, q.float().abs().to(E4M3), k, v, None, *FULL, None, 64 * scales, config=CODES[0])
        want = v[0, :, key].float() * 2.0**-1
        torch.testing.assert_close(out[0].float(), want.expand(out[0].shape), rtol=2.0**-8, atol=0)


def test_many_weights_are_summed_in_float32():
    """Equal ones: the mean of the values, which 14 bits would lose."""
    (q, k, v, _), scales, (*_, exact, _) = of_codes(2000, 1, 1)
    q = torch.zeros_like(q)[:16]
    out = ATTENTION.outputs(q, k, v, None, *FULL, None, scales)
    attention.run(out, None, q, k, v, None, *FULL, None, scales, config=None)
    torch.testing.assert_close(out[0], exact.mean(0).expand(out[0].shape).to(torch.bfloat16), rtol=2.0**-7, atol=1e-6)


def test_values_of_codes_that_are_a_part_of_longer_rows():
    (q, k, v, gate), scales, _ = of_codes(20)
    longer = torch.full((*v.shape[:2], 80), 448.0, device=DEVICE).to(E4M3)
    longer[..., :32] = v
    out = [ATTENTION.outputs(q, k, v, gate, *FULL, None, scales)[0] for _ in range(2)]
    for made, values in zip(out, (v, longer[..., :32]), strict=True):
        attention.run((made,), None, q, k, values, gate, *FULL, None, scales, config=CODES[0])
    assert torch.equal(*out)


def test_heads_that_are_not_taken_in_eight_bits():
    given, scales, _ = of_codes(6, dim=48)
    assert attention.supports(*given, *FULL, None, scales) == "head dimension 48, allowed in eight bits: 32, 64, 128"
