"""The product with float8 weights against float64, in every instruction set that this CPU runs."""

import pytest
import torch
from exact_float8 import VALUES

from exactness import check_exactness
from horsepower.kernels import native_library
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.linear import LINEAR, native, native_supports, native_workspace, outputs, reference
from horsepower.kernels.native_library import ISAS
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import OPS

F32, BF16 = torch.float32, torch.bfloat16
EVERY = torch.arange(256, dtype=torch.uint8).view(E4M3)
TRUE = torch.cat([torch.tensor([*sign * VALUES, float("nan")]) for sign in (1.0, -1.0)])  # of each code, as float64


@pytest.fixture(autouse=True)
def four_threads(monkeypatch):
    """More than this machine may have, and for little work, so that tiles are divided."""
    monkeypatch.setattr(native_library, "ELEMENTS_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def inputs(rows, depth, width, experts=1, dtype=BF16):
    generator = torch.Generator().manual_seed(rows + depth + width)
    x = torch.randn(rows, depth, generator=generator).to(dtype)
    weight, scale = ops.quantise(torch.randn(experts * width, depth, generator=generator))
    return x, weight, scale


def run(isa, x, weight, scale, experts=1, counts=(), out=None):
    """Outputs and scratch memory are poisoned first: what is not written shows."""
    arguments = (x, weight, experts, counts, None, scale)
    out = outputs(*arguments) if out is None else (out,)
    out[0].fill_(torch.nan)
    scratch = torch.full((native_workspace(*arguments, isa=isa),), 0xFF, dtype=torch.uint8)
    native(out, scratch, *arguments, isa)
    return out[0]


def check(isa, x, weight, scale, experts=1, counts=(), out=None):
    exact = reference(x.double(), weight, experts, counts, None, scale.double())[0]
    got = run(isa, x, weight, scale, experts, counts, out)
    check_exactness(got, reference(x, weight, experts, counts, None, scale)[0], exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("columns", [128, 67])
def test_every_code_is_decoded_exactly(isa, dtype, rows, columns):
    """In every place of a row: x picks one column of the weight in each of its rows."""
    assert torch.equal(TRUE.isnan(), EVERY.double().isnan())
    weight = EVERY.repeat(columns).view(columns, 256).t().contiguous()  # row o is code o throughout
    want = TRUE.to(dtype).expand(rows, 256)
    for first in range(0, columns - rows + 1, rows):
        x = torch.eye(columns, dtype=dtype)[first : first + rows]
        got = run(isa, x, weight, torch.ones(256, 1))
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 47])
def test_odd_and_prime_sizes(isa, dtype, rows):
    for depth in (1, 2, 3, 17, 63, 64, 65, 257, 300, 701):
        for width in (1, 7, 31, 64, 67, 131):
            if rows * width > 4:  # the sum of one output may cancel
                check(isa, *inputs(rows, depth, width, dtype=dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [4, 60])
def test_long_sums(isa, dtype, rows):
    check(isa, *inputs(rows, 6001, 67, dtype=dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("counts", [(25, 31, 40), (96, 0, 0), (0, 0, 96), (1, 95, 0), (3, 85, 8), (0, 0, 0)])
def test_each_modality_meets_its_own_weight(isa, counts):
    for width in (6, 70):
        x, weight, scale = inputs(sum(counts), 130, width, experts=3)
        check(isa, x, weight, scale, 3, counts)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [5, 23])
def test_strided_rows(isa, dtype, rows):
    """Of x, of the weight and of the result; from an odd column on, and backwards in memory nothing is written."""
    x, weight, scale = inputs(2 * rows, 131, 134, dtype=dtype)
    memory = torch.full((rows, 80), 7.0, dtype=dtype)
    check(isa, x[::2, 1:98], weight[::2, 3:100], scale[::2].contiguous(), out=memory[:, 5:72])
    assert (memory[:, :5] == 7).all()
    assert (memory[:, 72:] == 7).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [2, 14])
@pytest.mark.parametrize("depth", [64, 77])
def test_what_is_not_finite_stays_in_its_row_and_column(isa, dtype, rows, depth):
    x, weight, scale = inputs(rows, depth, 70, dtype=dtype)
    x[1, -1], x[0, 0], weight[69, depth - 1], scale[3] = torch.inf, torch.nan, torch.nan, torch.inf
    got, want = run(isa, x, weight, scale), reference(x, weight, 1, [], None, scale)[0]
    torch.testing.assert_close(got, want, rtol=2.0**-6, atol=2.0**-6, equal_nan=True)
    assert got[1:, :69].isnan().sum() == want[1:, :69].isnan().sum() < rows * 69


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_tiny_and_huge(isa, dtype, scale):
    for rows in (3, 30):
        x, weight, own = inputs(rows, 100, 67, dtype=dtype)
        check(isa, x * scale, weight, own)
        check(isa, x, weight, own * scale)


@pytest.mark.parametrize("isa", ISAS)
def test_denormal_codes_count_where_the_host_flushes_denormals(isa):
    weight = torch.arange(8, dtype=torch.uint8).view(E4M3).repeat_interleave(64).view(8, 64)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush")
    try:
        for dtype in (F32, BF16):
            for rows in (3, 30):
                got = run(isa, torch.ones(rows, 64, dtype=dtype), weight, torch.ones(8, 1))
                assert torch.equal(got, (torch.arange(8) * 2.0**-3).to(dtype).expand(rows, 8))
    finally:
        torch.set_flush_denormal(False)


def test_a_batch_of_rows():
    x, weight, scale = inputs(12, 64, 70)
    want = run(ISAS[0], x, weight, scale)
    assert torch.equal(LINEAR(x.unflatten(0, (3, 4)), weight, 1, [], None, scale)[0].flatten(0, 1), want)


@pytest.mark.parametrize("rows", [1, 40])
def test_the_kernel_is_what_the_registered_op_runs(rows):
    x, weight, scale = inputs(rows, 64, 70)
    assert LINEAR.kernel(x, weight, 1, [], None, scale).name == "native"
    arguments = (x, weight, 1, [], None, scale)
    torch.library.opcheck(torch.ops.horsepower.linear.default, arguments, test_utils="test_faketensor")
    assert torch.equal(ops.linear(*arguments), run(ISAS[0], x, weight, scale))


def test_fused_ops_run_it_too():
    x, weight, scale = inputs(20, 64, 70)
    u = run(ISAS[0], x, weight, scale)
    (got,) = OPS["linear_activation"](x, weight, 1, [], "gelu7", BF16, None, scale)
    assert torch.equal(got, OPS["activation"](u, "gelu7", BF16)[0])


def test_what_the_kernel_does_not_take_goes_to_the_reference():
    x, weight, scale = inputs(4, 64, 70)
    for arguments, reason in [
        ((x, x, 1, []), "the weight is not quantised"),
        ((x.double(), weight, 1, [], None, scale), "x is neither float32 nor bfloat16"),
        ((x[:, :0], weight[:, :0], 1, [], None, scale), "x has no columns"),
        ((x.view(2, 2, 64)[:, :1], weight, 1, [], None, scale), None),
        ((x.view(2, 2, 64).transpose(0, 1), weight, 1, [], None, scale), "its rows are not equally far apart"),
        ((x[:, ::2], weight[:, ::2], 1, [], None, scale), "the last dimension is not contiguous"),
        ((x, weight, 1, [], None, scale.expand(-1, 2)[:, :1]), None),
        ((x, weight[:35], 1, [], None, scale[::2]), "the scales are not contiguous"),
    ]:
        assert native_supports(*arguments) == reason
        if reason:
            assert torch.equal(LINEAR(*arguments)[0], reference(*arguments)[0])


def test_many_rows_are_not_for_the_portable_kernel(monkeypatch):
    """Whose products of a decoded weight torch is three times as fast at."""
    monkeypatch.setattr("horsepower.kernels.linear.ISAS", ("portable",))
    for rows, taken in ((32, True), (33, False)):
        x, weight, scale = inputs(rows, 64, 70)
        assert (native_supports(x, weight, 1, [], None, scale) is None) == taken


def test_scratch_memory_is_for_codes_alone():
    x, weight, scale = inputs(40, 300, 70)
    assert native_workspace(x, weight, 1, [], None, scale) > 0
    assert LINEAR.workspace(("cpu",), x, x.new_empty(70, 300), 1, []) == 0
    assert LINEAR.workspace(("cpu",), *(each.to("meta") for each in (x, weight)), 1, []) > 0
