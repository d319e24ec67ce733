"""Softmax attention with the gate in its epilogue, over all keys or through the window, in one launch.

A program takes a tile of query rows of one head and walks over tiles of keys with a running maximum and sum (online
softmax, FlashAttention-2). Masks cost, and where all of its rows see all keys of a tile none is needed: such tiles go
first; a short loop takes those at the edges of frames and at the end.

On sm_90 a tile of 128 x 128 takes a thread 505 instructions (481 by Triton 3.6) for its 64 scores: FMNMX, FFMA,
MUFU.EX2, FADD, half an F2FP for each, and an FMUL for each of its 64 sums. There is one wait: the second product runs
on under the first of the next tile. Triton waits for the scores before their softmax, so that products and softmax
overlap between warp groups alone.

In eight bits, values come turned, and each tile's product is added to the sums in float32: wgmma would keep about 14
bits of them. The weights are shuffled between threads, since codes are multiplied in another layout than they are
summed in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from horsepower.kernels import attention as op
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu.launch import Config, default, launch, place_of, writes_no_codes
from horsepower.kernels.modality import first_rows
from horsepower.kernels.transpose_to_codes import turned

LOG2_E = 1.4426950408889634
PROMPT = ("second", "third", "L", "S", "frames", "tokens", "window")  # what changes with it: not to be compiled for
WEIGHTS = tl.constexpr(op.WEIGHTS)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # not -inf: a row may see nothing of its first tile


@triton.jit
def _rows(x, column, first, limit, pitch, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
          TMA: tl.constexpr, BOUNDED: tl.constexpr):  # fmt: skip
    """A tile of rows of one head, zeros beyond its bounds; x is a descriptor, or points to the head's first row."""
    if TMA:
        tile = x.load([first, column])
    else:
        row = first + tl.arange(0, ROWS)
        at = tl.arange(0, WIDTH)
        place = x + (row.to(tl.int64) * pitch)[:, None] + at[None, :]
        if WIDTH != D and BOUNDED:
            tile = tl.load(place, mask=(row < limit)[:, None] & (at < D)[None, :], other=0.0)
        elif WIDTH != D:
            tile = tl.load(place, mask=(at < D)[None, :], other=0.0)
        elif BOUNDED:
            tile = tl.load(place, mask=(row < limit)[:, None], other=0.0)
        else:
            tile = tl.load(place)
    return tile


@triton.jit
def _tile(acc, total, top, q, k, v, seen, scale, MASKED: tl.constexpr):
    """Fold one tile of keys into the running sums. `top` is the running maximum, times `scale`; base 2 throughout."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1) * scale)
    if v.dtype == tl.float8e4nv:
        weights = tl.exp2(scores * scale - (new - WEIGHTS)[:, None])
    else:
        weights = tl.exp2(scores * scale - new[:, None])  # one FFMA and one MUFU.EX2 a score
    shrink = tl.exp2(top - new)
    total = total * shrink + tl.sum(weights, 1)
    if v.dtype == tl.float8e4nv:
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v.T)
    else:
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new


@triton.jit(do_not_specialize=PROMPT)
def attention_kernel(
    q, k, v, gate, out, q_row, q_head, k_row, k_head, v_row, v_head, gate_row, gate_head, out_row, out_head, group,
    second, third, L, S, scale, frames, tokens, window, inverse, scales, D: tl.constexpr, WIDTH: tl.constexpr,
    WINDOWED: tl.constexpr, GATED: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The query heads of one kv head run side by side, then its other rows: its keys and values stay in the L2 cache
    tiles = tl.cdiv(L, BLOCK_M)
    program = tl.program_id(0)
    kv = program // (tiles * group)
    head = kv * group + program % group
    first = program // group % tiles * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    if not TMA:
        q += head.to(tl.int64) * q_head
        k += kv.to(tl.int64) * k_head
        v += kv.to(tl.int64) * v_head
    if scales is not None:
        scale *= tl.load(scales)
    query = _rows(q, head * q_head, first, L, q_row, BLOCK_M, D, WIDTH, TMA, True)

    # Tiles of keys: of the frames from `low` on, `edge` of which only some rows see before `inner` that all of them see
    # and others after; then of everything from `video` on, which all rows see
    ALIGN: tl.constexpr = 1 if scales is None else 16  # where tiles of values that are turned may begin
    low, edge, inner, frame_tiles, video = 0, 0, 0, 0, 0
    if WINDOWED:
        video = frames * tokens
        begin = first // tokens
        end = tl.minimum(first + BLOCK_M, video) - 1
        end = tl.maximum(end, 0) // tokens
        some = first < video  # some rows are video
        only = first + BLOCK_M <= video  # all are
        low = tl.where(only, tl.maximum(begin - window, 0) * tokens // ALIGN * ALIGN, 0)
        high = tl.where(only, tl.minimum(end + window + 1, frames) * tokens, video)
        all_from = tl.where(some, tl.maximum(end - window, 0) * tokens, 0)
        all_to = tl.where(some, tl.minimum(begin + window + 1, frames) * tokens, video)
        edge = tl.cdiv(all_from - low, BLOCK_N)
        inner = tl.maximum((all_to - low) // BLOCK_N - edge, 0)
        frame_tiles = tl.cdiv(high - low, BLOCK_N)
        frame = row // tokens
        row_from = tl.where(row < video, tl.maximum(frame - window, 0) * tokens, 0)
        row_to = tl.where(row < video, tl.minimum(frame + window + 1, frames) * tokens, video)
    behind = video // ALIGN * ALIGN  # where the first tile of everything else begins
    mixed, rest = 0, (S - behind) // BLOCK_N
    if ALIGN > 1:
        mixed = tl.minimum(video - behind, 1)  # if that holds the end of the video too
        rest = tl.maximum(rest - mixed, 0)

    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    for i in tl.range(0, inner + rest):
        start = i * BLOCK_N
        if WINDOWED:
            start += tl.where(i < inner, low + edge * BLOCK_N, behind + (mixed - inner) * BLOCK_N)
        key = _rows(k, kv * k_head, start, S, k_row, BLOCK_N, D, WIDTH, TMA, False)
        if scales is not None:
            value = v.load([kv * D, start])
        else:
            value = _rows(v, kv * v_head, start, S, v_row, BLOCK_N, D, WIDTH, TMA, False)
        acc, total, top = _tile(acc, total, top, query, key, value, None, scale, False)

    some_see = frame_tiles - inner
    for i in tl.range(0, some_see + mixed + tl.cdiv(S - behind - (mixed + rest) * BLOCK_N, BLOCK_N)):
        start = behind + (i - some_see + tl.where(i < some_see + mixed, 0, rest)) * BLOCK_N
        if WINDOWED:
            start = tl.where(i < some_see, low + (i + tl.where(i < edge, 0, inner)) * BLOCK_N, start)
        at = start + tl.arange(0, BLOCK_N)
        if WINDOWED:
            seen_from, seen_to = tl.where(i < some_see, row_from, video), tl.where(i < some_see, row_to, S)
            seen = (at[None, :] >= seen_from[:, None]) & (at[None, :] < seen_to[:, None])
        else:
            seen = (at < S)[None, :]
        key = _rows(k, kv * k_head, start, S, k_row, BLOCK_N, D, WIDTH, TMA, True)
        if scales is not None:
            value = v.load([kv * D, start])
        else:
            value = _rows(v, kv * v_head, start, S, v_row, BLOCK_N, D, WIDTH, TMA, True)
        acc, total, top = _tile(acc, total, top, query, key, value, seen, scale, True)

    factor = 1.0 / total
    if scales is not None:
        factor *= tl.load(scales + 1)
    if GATED:
        expert = (row >= second).to(tl.int32) + (row >= third).to(tl.int32)
        place = row.to(tl.int64) * gate_row + (expert * (tl.num_programs(0) // tiles) + head) * gate_head
        factor *= tl.sigmoid(tl.load(gate + place, mask=row < L, other=0.0).to(tl.float32))
    at = tl.arange(0, WIDTH)
    place = out + head.to(tl.int64) * out_head + (row.to(tl.int64) * out_row)[:, None] + at[None, :]
    acc *= factor[:, None]
    if inverse is not None:
        acc *= tl.load(inverse)
    tl.store(place, acc.to(out.dtype.element_ty), mask=(row < L)[:, None] & (at < D)[None, :])


def _config(m: int, n: int, warps: int, stages: int, tma: int, form: str = "") -> Config:
    return Config(warps, stages, {"BLOCK_M": m, "BLOCK_N": n, "TMA": tma}, form)


CONFIGS = {
    "sm_80": (_config(128, 64, 8, 3, 0), _config(128, 64, 8, 2, 0), _config(128, 32, 8, 3, 0)),
    "sm_90": (
        *(_config(128, 128, 8, 2, 1), _config(128, 128, 8, 3, 1), _config(128, 64, 8, 3, 1)),
        *(_config(128, 128, 8, 2, 1, "fp8"), _config(128, 128, 8, 3, 1, "fp8"), _config(128, 64, 8, 3, 1, "fp8")),
    ),
}
PADDED = {"sm_80": _config(128, 32, 8, 3, 0), "sm_90": _config(128, 64, 8, 3, 0)}  # heads below 128, no power of two
WIDE = {"sm_80": _config(64, 32, 8, 2, 0), "sm_90": _config(128, 32, 8, 2, 1)}  # heads above 128
CLAIMS = {
    "sm_80": {"attention_kernel": ("HMMA", "LDGSTS", "MUFU.EX2")},
    "sm_90": {"attention_kernel": ("HGMMA", "UTMALDG", "MUFU.EX2")},
}


def supports(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, experts: int, counts: Sequence[int], frames: int, video: int,
    window: int, inverse: Tensor | None = None, scales: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take these inputs, or None."""
    D = q.shape[-1]
    if scales is not None:
        if q.is_cuda and place_of(q).arch == "sm_80":
            return "sm_80 has no products of FP8"
        if D not in op.HEADS_OF_CODES:
            return f"head dimension {D}, allowed in eight bits: {', '.join(map(str, op.HEADS_OF_CODES))}"
    elif q.dtype not in (torch.bfloat16, torch.float16):
        return "neither bfloat16 nor float16: the matrix units would round it"
    if gate is not None and gate.dtype == torch.float64:
        return "the gate is float64"
    if D % 16 or not 16 <= D <= 256:
        return f"head dimension {D}, not a multiple of 16 up to 256"
    if k.shape[-3] < 1:
        return "there are no keys"
    if inverse is not None and (reason := writes_no_codes(q, E4M3)):
        return reason
    return "the last dimension is not contiguous" if any(x.stride(-1) != 1 for x in (q, k, v)) else None


def run(
    out: tuple[Tensor, ...], _workspace: None, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, experts: int,
    counts: Sequence[int], frames: int, video: int, window: int, inverse: Tensor | None = None,
    scales: Tensor | None = None, config: Config | None = None,
) -> None:  # fmt: skip
    """Any strides of rows and heads. Scores, softmax and sums in float32; the weights rounded to v's dtype."""
    if q.ndim == 4:
        for each in zip(out[0], q, k, v, strict=True):
            run((each[0],), None, *each[1:], None, 1, [], frames, video, window, config=config)
        return
    L, Hq, D = q.shape
    if not L:
        return
    config = config or _default(q, k)
    if D & (D - 1):  # beyond a head's end, TMA would fetch the next head
        config = replace(config, constants={**config.constants, "TMA": 0})
    q, k, v = (x if _fetchable(x, config) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    values = _operand(v, "BLOCK_N", config) if scales is None else _turned(v.contiguous(), config)
    tiles = triton.cdiv(L, config.constants["BLOCK_M"])
    second, third = first_rows(gate is not None and gate.ndim == 1 and experts != 1, counts, L)
    windowed = window >= 0 and video > 0
    launch(
        attention_kernel,
        (tiles * Hq,),
        _operand(q, "BLOCK_M", config),
        _operand(k, "BLOCK_N", config),
        values,
        q if gate is None else gate,
        out[0],
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        gate.stride(0) if gate is not None and gate.ndim == 2 else 0,
        1 if gate is None else gate.stride(-1),
        *out[0].stride()[:2],
        Hq // k.shape[1],
        second,
        third,
        L,
        k.shape[0],
        LOG2_E / D**0.5,
        frames if windowed else 1,
        video // frames if windowed else 1,
        min(window, frames) if windowed else 0,
        inverse,
        scales,
        D=D,
        WIDTH=triton.next_power_of_2(D),
        WINDOWED=windowed,
        GATED=gate is not None,
        config=config,
    )


def _default(q: Tensor, k: Tensor) -> Config:
    """What is checked in for heads like these."""
    D = q.shape[-1]
    if D <= 128 and D & (D - 1) == 0:
        return default(CONFIGS, q, k)
    return (PADDED if D < 128 else WIDE)[place_of(q).arch]


def _fetchable(x: Tensor, config: Config) -> bool:
    """Whether x [rows, heads, D] can be fetched 16 bytes at once where it lies; if not, a copy costs less.

    By the tensor memory accelerator: if the heads of a row lie side by side. By pointers: if Triton can tell.
    """
    if not x.is_meta and x.data_ptr() % 16:
        return False
    if config.constants["TMA"]:
        return x.stride(0) * x.itemsize % 16 == 0 and _width(x) <= x.stride(0)
    return x.stride(0) % 16 == x.stride(1) % 16 == 0


def _width(x: Tensor) -> int:
    """Elements from the start of a row to the end of its last head."""
    return (x.shape[1] - 1) * x.stride(1) + x.shape[2]


def _operand(x: Tensor, rows: str, config: Config) -> Any:
    """x for the kernel: itself, or a descriptor of its rows with all heads."""
    if not config.constants["TMA"]:
        return x
    return TensorDescriptor(x, [x.shape[0], _width(x)], [x.stride(0), 1], [config.constants[rows], x.shape[2]])


def _turned(v: Tensor, config: Config) -> Any:
    """A descriptor of values [Hkv, D, S] by tiles of one head."""
    rows, D, S = v.flatten(0, 1), *v.shape[1:]
    return TensorDescriptor(rows, list(rows.shape), [S, 1], [D, config.constants["BLOCK_N"]])


def examples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The attention of the DiT, over all tokens and through the window; narrower heads."""
    for label, D, window in (("full", 128, -1), ("windowed", 128, 11), ("heads of 64", 64, 11)):
        projection = torch.empty(4300, 56 * D + 128, dtype=torch.bfloat16, device="meta")
        q, k, v = projection[:, : 56 * D].unflatten(1, (56, D)).split([40, 8, 8], 1)
        gate = projection[:, 56 * D : 56 * D + 40]
        yield label, (q, k, v, gate, 1, [4160, 100, 40], 26, 4160, window)
        if D == 128:
            inverse = torch.empty(1, device="meta")
            yield f"{label}, into codes", (q, k, v, gate, 1, [4160, 100, 40], 26, 4160, window, inverse)
        q, k, v = (torch.empty(x.shape, dtype=E4M3, device="meta") for x in (q, k, v))
        v, scales = torch.empty(turned(v.shape), dtype=E4M3, device="meta"), torch.empty(2, device="meta")
        if D == 64 or window < 0:
            yield f"{label}, of codes", (q, k, v, gate, 1, [4160, 100, 40], 26, 4160, window, None, scales)
        if D == 128:
            operands = (q, k, v, gate, 1, [4160, 100, 40], 26, 4160, window, inverse, scales)
            yield f"{label}, of codes into codes", operands
