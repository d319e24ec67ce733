"""The op against float64 on odd shapes and hostile values, in every instruction set that this CPU runs."""

import pytest
import torch
from exact_float8 import encode

from exactness import check_exactness
from horsepower.kernels import attention
from horsepower.kernels.attention import (
    ATTENTION,
    native,
    native_supports,
    native_workspace,
    outputs,
    reference,
)
from horsepower.kernels.attention_ranges import key_ranges
from horsepower.kernels.float8 import E4M3, codes_of
from horsepower.kernels.native_library import ISAS
from horsepower.kernels.ops import ops

F32, BF16 = torch.float32, torch.bfloat16
ULP = {F32: 2.0**-23, BF16: 2.0**-8}
FULL = (1, [], 1, 0, -1)  # experts, counts, frames, video, window


def inputs(rows, heads=4, kv_heads=2, dim=32, dtype=BF16, gate=None, scale=1.0, seed=0):
    """q and k are views into wider rows, v is columns of a projection; gate: None or its shape."""
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(rows, (heads + 2 * kv_heads) * dim + 3, generator=generator).to(dtype)
    q, k, v = projection[:, :-3].unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
    gate = None if gate is None else torch.randn(gate, generator=generator)
    return q * scale, k, v, gate


def run(isa, *arguments):
    """The output and the scratch memory are poisoned first: what is not written shows."""
    out = outputs(*arguments)
    out[0].fill_(torch.nan)
    workspace = torch.full((native_workspace(*arguments, isa=isa),), 255, dtype=torch.uint8)
    native(out, workspace, *arguments, isa=isa)
    return out[0]


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


def check(isa, q, k, v, gate, *rest):
    """Not further from float64 than eager, but for a few roundings of the output."""
    got = run(isa, q, k, v, gate, *rest)
    assert got.isfinite().all()
    wide = (q.double(), k.double(), v.double(), None if gate is None else gate.double())
    exact = reference(*wide, *rest)[0]
    if exact.numel() and exact.norm():
        assert error(got, exact) <= max(1.1 * error(reference(q, k, v, gate, *rest)[0], exact), 4 * ULP[q.dtype])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 31, 64, 97, 512, 521, 1031])
def test_lengths(isa, dtype, rows):
    check(isa, *inputs(rows, dtype=dtype, gate=(rows, 4)), *FULL)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("dim", [1, 5, 16, 17, 24, 32, 48, 63, 64, 80, 128, 144])
def test_head_dims(isa, dtype, dim):
    check(isa, *inputs(67, dim=dim, dtype=dtype), *FULL)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (5, 1), (6, 2), (40, 8)])
def test_heads(isa, heads, kv_heads):
    check(isa, *inputs(53, heads, kv_heads), *FULL)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("gate_dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("shape", "experts", "counts"),
    [
        ((40, 4), 1, []),
        ((40, 4), 3, [20, 10, 10]),
        ((4,), 1, []),
        ((12,), 3, [20, 13, 7]),
        ((12,), 3, [0, 0, 40]),
        ((12,), 3, [0, 40, 0]),
        ((12,), 3, [39, 0, 1]),
    ],
)
def test_gates(isa, dtype, gate_dtype, shape, experts, counts):
    q, k, v, gate = inputs(40, dtype=dtype, gate=shape)
    check(isa, q, k, v, gate.to(gate_dtype), experts, counts, 1, 0, -1)


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_gates(isa):
    q, k, v, _ = inputs(3, dtype=F32)
    gate = torch.tensor([[-200.0, 200.0, 0.0, -80.0]]).expand(3, 4).contiguous()
    out = run(isa, q, k, v, gate, *FULL)
    torch.testing.assert_close(out, reference(q, k, v, gate, *FULL)[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("window", [0, 1, 11])
@pytest.mark.parametrize(
    ("frames", "tokens", "rest"), [(1, 7, 5), (3, 1, 2), (5, 13, 9), (7, 64, 0), (13, 16, 33), (26, 3, 1), (4, 0, 6)]
)
def test_windows(isa, dtype, window, frames, tokens, rest):
    video = frames * tokens
    q, k, v, gate = inputs(video + rest, dtype=dtype, gate=(12,))
    check(isa, q, k, v, gate, 3, [video, rest, 0], frames, video, window)


@pytest.mark.parametrize("isa", ISAS)
def test_a_window_over_many_blocks_of_keys(isa):
    check(isa, *inputs(5 * 331 + 70, heads=2, kv_heads=1, dim=16), 1, [], 5, 5 * 331, 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
def test_tiny_and_huge_scores(isa, dtype, scale):
    check(isa, *inputs(600, 2, 1, 16, dtype, scale=scale), *FULL)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_values(isa, dtype, scale):
    q, k, v, gate = inputs(70, dtype=dtype, gate=(70, 4))
    check(isa, q, k, v * scale, gate, *FULL)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_of_one_value_and_of_denormals(isa, dtype):
    q, k, v, gate = inputs(70, dtype=dtype)
    q, k, v = q.clone(), k.clone(), v.clone()
    q[0], k[1], v[2] = 3.0, -2.0, 5.0
    q[3], k[4], v[5] = 0.0, 0.0, 0.0
    q[6], k[7], v[8] = 1e-40, 1e-40, 1e-40
    check(isa, q, k, v, gate, *FULL)


@pytest.mark.parametrize("isa", ISAS)
def test_values_of_one_number_come_back(isa):
    q, k, v, _ = inputs(1100, dtype=F32)
    got = run(isa, q, k, torch.full_like(v, 0.7), None, *FULL)
    torch.testing.assert_close(got, torch.full_like(q, 0.7), rtol=1e-6, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_query_that_is_not_finite_stays_in_its_row(isa, dtype, value):
    q, k, v, _ = inputs(29, dtype=dtype)
    q = q.clone()
    q[11, 2, 3] = value
    finite = run(isa, q, k, v, None, *FULL).isfinite().all(-1)
    assert not finite[11, 2]
    assert finite.sum() == finite.numel() - 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("which", [1, 2])
def test_a_key_or_value_that_is_not_finite_reaches_only_who_sees_it(isa, dtype, which):
    """Frames of 7 rows: their edges lie inside of tiles and of pairs."""
    arguments = list(inputs(5 * 7 + 4, dtype=dtype))
    arguments[which] = arguments[which].clone()
    arguments[which][20, 1, 0] = torch.nan  # the last row of the third frame
    rest = (1, [], 5, 35, 1)
    finite = run(isa, *arguments, *rest).isfinite().all(-1)
    assert finite[:, :2].all()
    assert finite[:7, 2:].all()
    assert finite[28:35, 2:].all()
    assert not finite[7:28, 2:].any()
    assert not finite[35:, 2:].any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_scores_that_overflow_downwards_weigh_nothing(isa, dtype):
    q, k, v, _ = inputs(9, dtype=dtype)
    q, k = torch.full_like(q, 1e30), k.clone()
    k[:] = 0
    k[4] = -1e30
    got = run(isa, q, k, v, None, *FULL)
    assert got.isfinite().all()
    torch.testing.assert_close(got, reference(q, k, v, None, *FULL)[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("isa", ISAS)
def test_any_strides_of_rows_and_heads(isa):
    q, k, v, gate = inputs(66, 6, 2, 40, gate=(66, 8))
    check(isa, q[::2, ::3, 3:27], k[1::2, :, 16:], v[:33, :, :24], gate[::2, 2:4], *FULL)
    turned = v.transpose(0, 1).contiguous().transpose(0, 1)
    check(isa, q, k, turned, gate[:, :6], *FULL)


@pytest.mark.parametrize("frames", [1, 3, 26])
@pytest.mark.parametrize("window", [-1, 0, 1, 11])
def test_ranges_cover_all_queries_once(frames, window):
    covered = [
        i
        for rows, _ in key_ranges(frames, frames * 5, window, frames * 5 + 4, frames * 5 + 4)
        for i in range(200)[rows]
    ]
    assert covered == list(range(frames * 5 + 4))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_all_instruction_sets_agree(dtype):
    arguments = (*inputs(700, dtype=dtype, gate=(700, 4)), *FULL)
    results = [run(isa, *arguments) for isa in ISAS]
    for result in results[1:]:
        assert error(result, results[0].double()) < 4 * ULP[dtype]


def test_the_registered_op():
    q, k, v, gate = inputs(25, gate=(12,))
    rest = (3, [15, 6, 4], 3, 15, 1)
    op = torch.ops.horsepower.attention
    torch.library.opcheck(op.default, (q, k, v, gate, *rest))
    assert torch.equal(op(q, k, v, gate, *rest), run(ISAS[0], q, k, v, gate, *rest))


def test_the_workspace_follows_from_sizes_alone():
    q, k, v, gate = inputs(25)
    meta = (x.to("meta") for x in (q, k, v))
    assert native_workspace(*meta, gate, *FULL) == native_workspace(q, k, v, gate, *FULL) > 0


def test_what_the_kernel_does_not_take_goes_to_the_reference():
    q, k, v, gate = inputs(6, gate=(6, 4))
    turned = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert native_supports(q, k, v, gate, *FULL) is None
    assert native_supports(q, k, turned, gate, *FULL) == "the last dimension is not contiguous"
    assert native_supports(q.half(), k.half(), v.half(), gate, *FULL) == "neither float32 nor bfloat16"
    assert native_supports(q.to("meta"), k, v, gate, *FULL) == "not on the CPU"
    got, want = ATTENTION(q, k, turned, gate, *FULL), reference(q, k, turned, gate, *FULL)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"q": torch.zeros(6, 32)}, "q, k, v"),
        ({"q": torch.zeros(5, 4, 8), "window": 1}, "q, k, v"),
        ({"q": torch.zeros(6, 3, 8)}, "q, k, v"),
        ({"q": torch.zeros(6, 4, 8, dtype=BF16)}, "q, k, v"),
        ({"k": torch.zeros(6, 2, 7)}, "q, k, v"),
        ({"k": torch.zeros(6, 0, 8), "v": torch.zeros(6, 0, 8)}, "q, k, v"),
        ({"gate": torch.zeros(5)}, "gate"),
        ({"gate": torch.zeros(6, 3)}, "gate"),
        ({"gate": torch.zeros(12), "experts": 3, "counts": [6, 1, 0]}, "counts"),
        ({"frames": 4, "video": 6, "window": 1}, "frames"),
        ({"frames": 1, "video": 7, "window": 1}, "video"),
    ],
)
def test_wrong_inputs_name_the_field(change, field):
    good = {"q": torch.zeros(6, 4, 8), "k": torch.zeros(6, 2, 8), "v": torch.zeros(6, 2, 8), "gate": None}
    arguments = {**good, "experts": 1, "counts": [], "frames": 1, "video": 0, "window": -1} | change
    with pytest.raises(ValueError, match=f"{field}: got"):
        ATTENTION(*arguments.values())


def test_cost_counts_the_pairs_that_see_each_other():
    q, k, v, gate = inputs(4 * 5 + 3, gate=(23, 4))
    full = ATTENTION.cost(q, k, v, gate, 1, [], 4, 20, -1)
    seen = ATTENTION.cost(q, k, v, gate, 1, [], 4, 20, 0)
    assert full.flops == 4 * 23 * 23 * 4 * 32
    assert seen.flops == 4 * (20 * (5 + 3) + 3 * 23) * 4 * 32
    assert full.bytes == seen.bytes == 23 * 32 * (4 + 4 + 2 + 2) * 2 + 23 * 4 * 4


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("batch", "rows", "keys"), [(1, 7, 13), (3, 50, 1), (2, 1, 600), (2, 65, 64), (0, 3, 4)])
def test_other_keys_and_a_batch(isa, dtype, batch, rows, keys):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, rows, 4, 24), (batch, keys, 2, 24), (batch, keys, 2, 24))
    q, k, v = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    rest = (None, 1, [], 1, 0, -1)
    out = outputs(q, k, v, *rest)
    out[0].fill_(torch.nan)
    workspace = torch.empty(native_workspace(q, k, isa=isa), dtype=torch.uint8)
    native(out, workspace, q, k, v, *rest, isa=isa)
    exact = reference(q.double(), k.double(), v.double(), *rest)[0]
    check_exactness(out[0], reference(q, k, v, *rest)[0], exact)


def test_without_keys_the_reference_answers():
    q, k = torch.ones(3, 2, 8), torch.ones(0, 2, 8)
    assert native_supports(q, k, k, None, *FULL) == "there are no keys"
    with pytest.raises(ValueError, match="^q: got a batch"):
        ATTENTION(q[None], q[None], q[None], torch.ones(2), 1, [], 1, 0, -1)


def test_few_float32_tokens_go_to_torch():
    few, many = torch.ones(2, 16, 4, 16), torch.ones(2, 256, 4, 16)
    assert native_supports(few, few, few, None, *FULL) == "torch's attention is faster for so few tokens"
    assert native_supports(many, many, many, None, *FULL) is None
    assert native_supports(few.bfloat16(), few.bfloat16(), few.bfloat16(), None, *FULL) is None


def test_codes_of_the_result():
    """Gated in float32, then rounded to eight bits, once; what exceeds the bound saturates."""
    q, k, v, gate = inputs(40, gate=(40, 4))
    inverse = torch.tensor([100.0])
    (codes,) = ATTENTION(q, k, v, gate, *FULL, inverse)
    wide = reference(q.float(), k.float(), v.float(), gate, *FULL)[0]
    assert codes.dtype == E4M3
    assert torch.equal(codes.float(), codes_of(wide, inverse).float())
    assert ATTENTION(q, k, v * 1e6, gate, *FULL, inverse)[0].float().abs().max() == 448
    with pytest.raises(ValueError, match=r"inverse: got \[2\] torch.float32, allowed: \[1\]"):
        ATTENTION(q, k, v, gate, *FULL, torch.ones(2))
    with pytest.raises(ValueError, match="q: got a batch"):
        ATTENTION(q[None], k[None], v[None], None, *FULL, inverse)


def of_codes(rows, heads=4, kv_heads=2, dim=32, keys=None, gate=None, seed=0):
    """Codes of q, k and v, these turned, the gate, and their scales; and what the codes stand for, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, dim), (keys or rows, kv_heads, dim), (keys or rows, kv_heads, dim))
    q, k, v = (codes_of(100 * torch.randn(shape, generator=generator), 1.0) for shape in shapes)
    gate = None if gate is None else torch.randn(gate, generator=generator)
    scales = torch.tensor([2.0**-12, 2.0**-5])
    exact = q.double() * 2.0**-6, k.double() * 2.0**-6, v.double() * 2.0**-5, None if gate is None else gate.double()
    return (q, k, ops.transpose_to_codes(v.float(), torch.ones(1)), gate), scales, exact


@pytest.mark.parametrize(
    ("rows", "rest"),
    [(0, FULL), (1, FULL), (37, FULL), (44, (1, [], 5, 35, 1)), (44, (3, [35, 4, 5], 5, 35, 0)), (6, (1, [], 4, 0, 1))],
)
def test_codes_attend_as_what_they_stand_for(rows, rest, monkeypatch):
    """But for the weights, which are rounded to eight bits: by 2.6 % each, of which sums keep less."""
    monkeypatch.setattr(attention, "SCORES", 4 * 44 * 5)  # some rows at a time
    given, scales, exact = of_codes(rows, gate=(rest[0] * 4,))
    (got,) = ATTENTION.reference(*given, *rest, None, scales)
    assert got.dtype == BF16
    if rows:
        assert 0 < error(got, reference(*exact, *rest)[0]) < 0.026
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in (*given, *rest, None, scales)]
    torch.testing.assert_close(ATTENTION.reference(*wide)[0], reference(*exact, *rest)[0], rtol=1e-9, atol=1e-12)
    inverse = torch.tensor([30.0])
    (codes,) = ATTENTION.reference(*given, *rest, inverse, scales)
    assert codes.dtype == E4M3
    torch.testing.assert_close(codes.float() / 30, got.float(), rtol=0.07, atol=1e-3)


def test_weights_of_codes_are_the_nearest_to_eight_bits_of_up_to_256():
    (q, k, v, _), scales, (wide_q, wide_k, wide_v, _) = of_codes(9, 2, 1, keys=23)
    scores = torch.einsum("lhd,sgd->hls", wide_q, wide_k) / 32**0.5
    weights = 256 * (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = torch.from_numpy(encode(weights.numpy())).view(E4M3).double()
    want = torch.einsum("hls,sgd->lhd", rounded / weights.sum(-1, keepdim=True), wide_v)
    (got,) = ATTENTION.reference(q, k, v, None, *FULL, None, scales)
    assert error(got, want) < 2.0**-8


def test_no_codes_to_attend_to_give_zeros_as_no_keys_do():
    (q, k, v, gate), scales, _ = of_codes(5, gate=(5, 4))
    (got,) = ATTENTION(q, k[:0], v[..., :0], gate, *FULL, None, scales)
    assert got.shape == q.shape
    assert not got.any()


def test_equal_scores_give_the_mean_of_the_values():
    (q, k, v, _), scales, (*_, exact, _) = of_codes(40)
    (got,) = ATTENTION.reference(torch.zeros_like(q), k, v, None, *FULL, None, scales)
    torch.testing.assert_close(got, exact.mean(0).repeat_interleave(2, 0).expand(got.shape).to(BF16))


def test_codes_that_do_not_belong_together():
    (q, k, v, gate), scales, _ = of_codes(20, gate=(20, 4))
    for given, match in (
        ((q.float(), k, v, gate, *FULL, None, scales), "q, k, v: got torch.float32, .* allowed: .* with scales"),
        ((q, k, v[..., :20], gate, *FULL, None, scales), r"v: got \[2, 32, 20\], allowed: \[2, 32, 32\], as of"),
        ((q, k, k, gate, *FULL, None, scales), r"v: got \[20, 2, 32\], allowed: \[2, 32, 32\]"),
        ((q, k, v, gate, *FULL, None, scales[:1]), r"scales: got \[1\] torch.float32, allowed: \[2\]"),
        ((q, k, v, gate, *FULL, None, scales.double()), r"scales: got \[2\] torch.float64"),
        ((q[None], k[None], v[None], None, *FULL, None, scales), r"k: got \[1, 20, .* allowed: .* one sequence"),
        ((q, k, v, gate, *FULL), "scales: got None, allowed: those of q, k and v in"),
    ):
        with pytest.raises(ValueError, match=match):
            ATTENTION(*given)
