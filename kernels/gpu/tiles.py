"""What the matrix products share: the tiles over the modalities' rows, their order, and the product of one tile.

y = x weight^T by tiles of BM rows and BN columns. Each modality's rows begin a tile of their own. With TMA, operands
are tensor descriptors and a program goes through many tiles; without, they are pointers and a program has one tile.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from horsepower.kernels.gpu.launch import Config, launch, place_of
from horsepower.kernels.modality import first_rows

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
def product(
    a, b, a_pitch, b_pitch, row, end, b_row, b_end, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """a[row : row + BM] b[b_row : b_row + BN]^T in float32; rows from `end` and `b_end` on are undefined.

    Pitches are in 8 elements.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for k in range(0, K, BK):  # past K a descriptor reads zeros
            acc = tl.dot(a.load([row, k]), b.load([b_row, k]).T, acc)
    else:
        k = tl.arange(0, BK)
        a_pitch *= 8
        b_pitch *= 8
        a_rows = tl.minimum(tl.arange(0, BM), end - 1 - row)
        b_rows = tl.minimum(tl.arange(0, BN), b_end - 1 - b_row)
        a_at = a + row.to(tl.int64) * a_pitch + (a_rows[:, None] * a_pitch + k[None, :])
        b_at = b + b_row.to(tl.int64) * b_pitch + (b_rows[None, :] * b_pitch + k[:, None])
        for _ in range(0, K // BK):
            acc = tl.dot(tl.load(a_at), tl.load(b_at), acc)
            a_at += BK
            b_at += BK
        if K % BK:  # apart, since a mask narrows the loads
            inside = k < K % BK
            last = tl.load(b_at, mask=inside[:, None], other=0.0)
            acc = tl.dot(tl.load(a_at, mask=inside[None, :], other=0.0), last, acc)
    return acc


@triton.jit
def two_products(
    a, b, b_more, row, b_row, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MORE: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """As `product` with TMA, of BN columns and of MORE to their right: widths of tiles that are no power of two.

    All is read before it is multiplied, and the loop around may not be flattened: otherwise wgmma is serialised.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    acc_more = tl.zeros((BM, MORE), tl.float32)
    for k in range(0, K, BK):
        x, left, right = a.load([row, k]), b.load([b_row, k]), b_more.load([b_row + BN, k])
        acc = tl.dot(x, left.T, acc)
        acc_more = tl.dot(x, right.T, acc_more)
    return acc, acc_more


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


def refuses(x: Tensor, weight: Tensor) -> str | None:
    """Why x [L, K] and weight [experts * N, K] cannot be read by tiles, or None."""
    if x.ndim != 2:
        return f"x has {x.ndim} dimensions"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return "x is neither bfloat16 nor float16"
    if not x.shape[1]:
        return "x has no columns"
    return None if pitched(x) and pitched(weight) else "its rows do not begin at multiples of 16 bytes"


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

    STORE is 0 for a descriptor, which cannot stop at the end of a modality's rows. Otherwise the pitch comes in STORE
    elements: Triton has no other way to know how wide a row's stores may be. Wider rows than 512 bytes go in halves,
    for which shared memory has room.
    """
    if config.constants["TMA"] and experts == 1 and out.numel() and pitched(out):
        width = columns // 2 if columns * out.itemsize > 512 else columns
        return descriptor(out, config.constants["BM"], width), 0, 0
    unit = gcd(out.stride(0), 8)
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
    b = descriptor(weight, cut["BN"], cut["BK"]) if cut["TMA"] and tiles else weight
    launch(
        kernel,
        (min(tiles, place_of(x).sms) if cut["TMA"] else tiles,),
        a,
        b,
        x.stride(0) // 8,
        weight.stride(0) // 8,
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
