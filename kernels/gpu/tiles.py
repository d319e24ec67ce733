"""What the matrix products share: the tiles over the modalities' rows, their order, and the product of one tile.

y = x weight^T by tiles of BM rows and BN columns. Each modality's rows begin a tile of their own. With TMA, operands
are tensor descriptors and a program goes through many tiles; without, they are pointers and a program has one tile.

Of three forms: both operands of 16 bits; both e4m3 ("fp8"), whose products the tensor cores of sm_90 sum to about 14
bits, so that every 128 of them are added to sums in float32; or e4m3 weights alone ("w8a16"), decoded in registers.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu.launch import Config, launch, place_of
from horsepower.kernels.modality import first_rows
from horsepower.kernels.tables import form_of

CLAIMS = {"sm_90": ("HGMMA", "UTMALDG"), "sm_80": ("HMMA", "LDGSTS")}
ROWS = ("second", "third", "L")  # the arguments that every prompt changes: not to be compiled for


@triton.jit
def row_tiles(second, third, L, EXPERTS: tl.constexpr, BM: tl.constexpr):
    """How many tiles of rows there are."""
    if EXPERTS == 1:
        count = tl.cdiv(L, BM)
    else:
        count = tl.cdiv(second, BM) + tl.cdiv(third - second, BM) + tl.cdiv(L - third, BM)
    return count


@triton.jit
def tile_at(
    tile, columns, second, third, L, EXPERTS: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Of tile number `tile`: its first row, where its modality's rows end, its expert, its tile of columns.

    GROUP tiles of rows are done column by column, so that what is read stays in the L2 cache.
    """
    rows = row_tiles(second, third, L, EXPERTS, BM)
    above = tile // (GROUP * columns) * GROUP
    height = tl.minimum(rows - above, GROUP)
    within = tile % (GROUP * columns)
    m = above + within % height
    row, end, expert = m * BM, L, 0
    if EXPERTS > 1:
        to_second = tl.cdiv(second, BM)
        to_third = to_second + tl.cdiv(third - second, BM)
        expert = (m >= to_second).to(tl.int32) + (m >= to_third).to(tl.int32)
        row = tl.where(expert == 0, row, tl.where(expert == 1, second - to_second * BM, third - to_third * BM) + row)
        end = tl.where(expert == 0, second, tl.where(expert == 1, third, L))
    return row, end, expert, within // height


@triton.jit
def decoded(words, x, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Words [ROWS, DEPTH / 4] of four e4m3 codes each, as [ROWS, DEPTH] of the dtype that x has; exact.

    A code's bits are moved to where that dtype has its own, two codes at once, and the biases of the exponents evened
    out by a product. The carry out of a NaN, the only code whose seven bits are all ones, fills up the exponent.
    """
    BF16: tl.constexpr = x.dtype == tl.bfloat16
    LEFT: tl.constexpr = 4 if BF16 else 7
    BITS: tl.constexpr = 0x007F007F << LEFT
    ONE: tl.constexpr = 0x00010001 << LEFT
    CARRY: tl.constexpr = 0x00800080 << LEFT
    FILL: tl.constexpr = 15 if BF16 else 1
    SIGNS: tl.constexpr = -0x7FFF8000  # 0x80008000
    even = (words << LEFT) & BITS
    odd = (words >> (8 - LEFT)) & BITS
    even = (even | ((words << 8) & SIGNS)) + ((even + ONE) & CARRY) * FILL
    odd = (odd | (words & SIGNS)) + ((odd + ONE) & CARRY) * FILL
    first = tl.join(value(even, x.dtype), value(even >> 16, x.dtype))
    second = tl.join(value(odd, x.dtype), value(odd >> 16, x.dtype))
    return tl.reshape(tl.join(first, second), (ROWS, DEPTH))


@triton.jit
def value(bits, DTYPE: tl.constexpr):
    return bits.to(tl.int16).to(DTYPE, bitcast=True) * tl.full((), 2.0**120 if tl.bfloat16 == DTYPE else 2.0**8, DTYPE)


@triton.jit
def add_product(acc, x, w, BN: tl.constexpr, BK: tl.constexpr):
    """acc + x w of x [BM, BK], and w [BK, BN] or its words [BK / 4, BN]."""
    if w.dtype == tl.int32:
        acc = tl.dot(x, decoded(w.T, x, BN, BK).T, acc)
    elif x.dtype == tl.float8e4nv:
        acc = tl.dot(x, w, acc, max_num_imprecise_acc=min(BK, 128))
    else:
        acc = tl.dot(x, w, acc)
    return acc


@triton.jit
def product(
    a, b, a_pitch, b_pitch, row, end, b_row, b_end, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """a[row : row + BM] b[b_row : b_row + BN]^T in float32; rows from `end` and `b_end` on are undefined.

    Pitches are in 16 bytes.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    CODES: tl.constexpr = 4 if (b.dtype if TMA else b.dtype.element_ty) == tl.int32 else 1
    if TMA:
        for k in range(0, K, BK):  # past K a descriptor reads zeros
            acc = add_product(acc, a.load([row, k]), b.load([b_row, k // CODES]).T, BN, BK)
    else:
        k = tl.arange(0, BK)
        word = tl.arange(0, BK // CODES)
        a_pitch *= 8
        b_pitch *= 8 if CODES == 1 else 4
        a_rows = tl.minimum(tl.arange(0, BM), end - 1 - row)
        b_rows = tl.minimum(tl.arange(0, BN), b_end - 1 - b_row)
        a_at = a + row.to(tl.int64) * a_pitch + (a_rows[:, None] * a_pitch + k[None, :])
        b_at = b + b_row.to(tl.int64) * b_pitch + (b_rows[None, :] * b_pitch + word[:, None])
        for _ in range(0, K // BK):
            acc = add_product(acc, tl.load(a_at), tl.load(b_at), BN, BK)
            a_at += BK
            b_at += BK // CODES
        if K % BK:  # apart, since a mask narrows the loads
            tl.static_assert(K % CODES == 0)
            last = tl.load(b_at, mask=(word < K % BK // CODES)[:, None], other=0)
            acc = add_product(acc, tl.load(a_at, mask=(k < K % BK)[None, :], other=0.0), last, BN, BK)
    return acc


@triton.jit
def two_products(
    a, b, b_more, row, b_row, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MORE: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """As `product` with TMA, of BN columns and of MORE to their right: widths of tiles that are no power of two.

    In FP8 also of 256 columns: of two halves, only one at a time has products that are not in its sums yet, for which
    there are registers. All is read before it is multiplied: otherwise wgmma is serialised.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    acc_more = tl.zeros((BM, MORE), tl.float32)
    for k in range(0, K, BK):
        x, left, right = a.load([row, k]), b.load([b_row, k]), b_more.load([b_row + BN, k])
        acc = add_product(acc, x, left.T, BN, BK)
        acc_more = add_product(acc_more, x, right.T, MORE, BK)
    return acc, acc_more


@triton.jit
def scaled(acc, x_scale, weight_scale, row, end, b_row, b_end, BM: tl.constexpr, BN: tl.constexpr):
    """Sums [BM, BN] of products of codes, times the scales of their rows, if there are any, and of their columns."""
    if x_scale is not None:
        rows = tl.arange(0, BM)
        acc *= tl.load(x_scale + row + rows, mask=row + rows < end, other=0.0)[:, None]
    if weight_scale is not None:
        columns = b_row + tl.arange(0, BN)
        acc *= tl.load(weight_scale + columns, mask=columns < b_end, other=0.0)[None, :]
    return acc


@triton.constexpr_function
def flat(b_dtype, tma, more, experts):
    """Whether the loop over tiles and that over K are flattened into one, so that the next tile is fetched meanwhile.

    Two products of 16 bits would be serialised; codes leave no registers to find the expert of the next tile.
    """
    if b_dtype in (tl.float8e4nv, tl.int32):
        return tma > 0 and experts == 1
    return tma > 0 and more == 0


@triton.jit
def halves(u, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of u's columns; they stay in the registers where they are."""
    return tl.split(tl.permute(tl.reshape(u, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def store(
    out, pitch, row, end, column, columns, values, BM: tl.constexpr, BN: tl.constexpr, STORE: tl.constexpr
):  # fmt: skip
    """Write a tile, but for rows from `end` and columns from `columns` on; see `writable`."""
    BITS: tl.constexpr = (out.dtype if STORE == 0 else out.dtype.element_ty).primitive_bitwidth
    if BITS * BN > 4096:
        left, right = halves(values, BM, BN)
        store_part(out, pitch, row, end, column, columns, left, BM, BN // 2, STORE)
        store_part(out, pitch, row, end, column + BN // 2, columns, right, BM, BN // 2, STORE)
    else:
        store_part(out, pitch, row, end, column, columns, values, BM, BN, STORE)


@triton.jit
def store_part(
    out, pitch, row, end, column, columns, values, BM: tl.constexpr, BN: tl.constexpr, STORE: tl.constexpr
):  # fmt: skip
    if STORE == 0:
        out.store([row, column], values.to(out.dtype))
    else:
        pitch *= STORE
        rows = tl.arange(0, BM)
        at = column + tl.arange(0, BN)
        inside = (row + rows < end)[:, None] & (at < columns)[None, :]
        first = out + row.to(tl.int64) * pitch
        tl.store(first + (rows[:, None] * pitch + at[None, :]), values.to(out.dtype.element_ty), mask=inside)


def refuses(x: Tensor, weight: Tensor, x_scale: Tensor | None = None, weight_scale: Tensor | None = None) -> str | None:
    """Why x [L, K] and weight [experts * N, K] cannot be read by tiles, or their scales; or None."""
    if x.ndim != 2:
        return f"x has {x.ndim} dimensions"
    if x.dtype not in (torch.bfloat16, torch.float16, E4M3):
        return "x is neither bfloat16 nor float16"
    if not x.shape[1]:
        return "x has no columns"
    form = form_of((x, weight))
    if form == "w8a16" and x.shape[1] % 4:
        return f"{x.shape[1]} codes a row are no multiple of 4"
    if form == "fp8" and x.is_cuda and place_of(x).arch == "sm_80":
        return "sm_80 has no products of FP8"
    if weight_scale is not None and weight_scale.shape[0] < weight.shape[0]:
        return "the weight has one scale for all outputs"
    if any(scale is not None and not scale.is_contiguous() for scale in (x_scale, weight_scale)):
        return "its scales are not contiguous"
    return None if pitched(x) and pitched(weight) else "its rows do not begin at multiples of 16 bytes"


def readable(x: Tensor, weight: Tensor) -> Tensor:
    """The weight as `product` takes it: e4m3 codes in words of four, unless x is of codes too."""
    return weight[:, : x.shape[1]].view(torch.int32) if form_of((x, weight)) == "w8a16" else weight


def weight_tile(x: Tensor, weight: Tensor, columns: str, config: Config) -> Any:
    """A descriptor of the weight for tiles of so many columns, the name of a constant; None where there are none."""
    if not config.constants.get(columns) or not weight.numel():
        return None
    weight = readable(x, weight)
    return descriptor(
        weight, config.constants[columns], config.constants["BK"] // (4 if weight.dtype == torch.int32 else 1)
    )


def pitched(x: Tensor) -> bool:
    """Whether the rows of x [rows, columns] begin at multiples of 16 bytes, as descriptors and wide loads ask."""
    start = x.storage_offset() * x.itemsize if x.is_meta else x.data_ptr()  # the storage, too, may begin anywhere
    aligned = start % 16 == x.stride(0) * x.itemsize % 16 == 0
    return aligned and x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """Of x [rows, columns], read or written by tiles of that many rows and columns."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def writable(out: Tensor, experts: int, config: Config, columns: int) -> tuple[Any, int, int]:
    """`out`, its pitch and STORE, as `store` takes them for tiles of so many columns.

    STORE is 0 for a descriptor, which cannot stop at the end of a modality's rows, and whose copy of codes in shared
    memory would be written byte by byte. Otherwise the pitch comes in STORE elements: Triton has no other way to know
    how wide a row's stores may be. Wider rows than 512 bytes go in halves, for which shared memory has room.
    """
    described = config.constants["TMA"] and experts == 1 and out.itemsize > 1
    if described and out.numel() and pitched(out):
        width = columns // 2 if columns * out.itemsize > 512 else columns
        return descriptor(out, config.constants["BM"], width), 0, 0
    unit = gcd(out.stride(0), max(8, 16 // out.itemsize))
    return out, out.stride(0) // unit, unit


def launch_tiles(
    kernel: Any, x: Tensor, weight: Tensor, experts: int, counts: Sequence[int], *args: Any, config: Config,
    **constants: Any,
) -> None:  # fmt: skip
    """Start `kernel(a, b, a_pitch, b_pitch, second, third, L, *args)`; its programs go on until all tiles are done."""
    cut = config.constants
    L, N = x.shape[0], weight.shape[0] // experts
    second, third = first_rows(experts == 3, counts, L)
    rows = sum(triton.cdiv(n, cut["BM"]) for n in (second, third - second, L - third))
    tiles = rows * triton.cdiv(N, cut["BN"] + cut.get("MORE", 0))
    a = descriptor(x, cut["BM"], cut["BK"]) if cut["TMA"] and tiles else x
    b = weight_tile(x, weight, "BN", config) if cut["TMA"] and tiles else readable(x, weight)
    launch(
        kernel,
        (min(tiles, place_of(x).sms) if cut["TMA"] else tiles,),
        a,
        b,
        x.stride(0) * x.itemsize // 16,
        weight.stride(0) * weight.itemsize // 16,
        second,
        third,
        L,
        *args,
        N=N,
        K=x.shape[1],
        EXPERTS=experts,
        config=config,
        **constants,
    )


def product_claims(kernel: str, **others: tuple[str, ...]) -> dict[str, dict[str, tuple[str, ...]]]:
    """The `CLAIMS` of a kernel by tiles and of others, by their names, that follow it."""
    return {arch: {kernel: own, **others} for arch, own in CLAIMS.items()}


def codes(form: str, width: int, columns: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x [4300, width], an e4m3 weight [columns, width] and the scales of both, on the meta device."""
    fp8 = form == "fp8"
    x = torch.empty(4300, width, dtype=E4M3 if fp8 else torch.bfloat16, device="meta")
    weight = torch.empty(columns, width, dtype=E4M3, device="meta")
    return x, weight, torch.empty(4300, 1, device="meta") if fp8 else None, torch.empty(columns, 1, device="meta")
