"""Softmax attention with the model's gate, over all tokens or through a window of neighbouring frames.

    out = softmax(q k^T / sqrt(D)) v * sigmoid(gate)

Keys may be those of another sequence. Rows are video (frame-major), audio, text. With a window, a video row sees the
frames within `window` of its own, and all audio and text; audio and text rows see everything. Query head j reads kv
head j // (Hq / Hkv).

In eight bits, q, k and v are codes, each with one scale, and so are the weights of values, of which the largest of a
row is about 2^8, as in FlashAttention 3: codes below 2^-6 have less than three bits behind the first.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from horsepower import _native
from horsepower.kernels.attention_library import CUDNN, FLASH_2, FLASH_3, FLASH_4, TORCH_FLASH
from horsepower.kernels.attention_ranges import gate_factor, key_ranges
from horsepower.kernels.float8 import E4M3, arithmetic, codes_of, widen
from horsepower.kernels.modality import check_counts, first_rows
from horsepower.kernels.native_library import ISAS, refuses, threads
from horsepower.kernels.registry import Cost, Kernel, Op, register
from horsepower.kernels.sizes import differ
from horsepower.kernels.transpose_to_codes import turned
from horsepower.kernels.triton_library import triton_kernel

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? gate, int experts, SymInt[] counts, SymInt frames, SymInt video,"
    " int window, Tensor? inverse=None, Tensor? scales=None) -> Tensor"
)

HEADS_OF_CODES = (32, 64, 128)  # dimensions that a kernel takes in eight bits
WEIGHTS = 8  # the logarithm of a row's largest weight, in eight bits
SCORES = 2**24  # of so many, the reference makes at a time


def outputs(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, experts: int, counts: Sequence[int], frames: int, video: int,
    window: int, inverse: Tensor | None = None, scales: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """q [L, Hq, D], k and v [S, Hkv, D] of one dtype -> [L, Hq, D]; or all of them with a batch in front, without gate.

    With a window, S = L.
    gate, before its sigmoid: [L, Hq] for a gate a token, or [experts * Hq] for one a head (and a modality), or None.
    window: latent frames on either side, or -1 for all; the first `video` rows are `frames` frames of equal size.
    inverse: float32 [1], what the result is multiplied by before it becomes codes of eight bits.
    scales: float32 [2], of q times k, and of v; they are codes then, v as `transpose_to_codes` leaves it, and without
    `inverse` the result is bfloat16.
    Raises ValueError for inputs that do not belong together.
    """
    if scales is None and q.dtype == E4M3:
        raise ValueError(f"scales: got None, allowed: those of q, k and v in {E4M3}")
    if scales is not None:
        _check_codes(q, k, v, scales)
        v = k  # whose shape it has, turned
    same = (*q.shape[:-3], *((q.shape[-3],) if window >= 0 else k.shape[-3:-2]), k.shape[-2], q.shape[-1])
    if q.ndim not in (3, 4) or differ(k.shape, same) or differ(v.shape, same) or k.shape[-2] < 1:
        raise ValueError(f"q, k, v: got {[list(x.shape) for x in (q, k, v)]}, allowed: [L, Hq, D], 2 x [S, Hkv, D]")
    if not q.dtype == k.dtype == v.dtype or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q, k, v: got {q.shape[-2]}, {k.shape[-2]} heads, allowed: Hkv that divides Hq; one dtype")
    L, Hq = q.shape[-3:-1]
    if q.ndim == 4 and (gate is not None or inverse is not None or window >= 0):
        raise ValueError("q: got a batch, allowed: one sequence, for a gate, a window or codes")
    if gate is not None and all(differ(gate.shape, wanted) for wanted in ((L, Hq), (experts * Hq,))):
        raise ValueError(f"gate: got {list(gate.shape)}, allowed: [{L}, {Hq}] or [{experts * Hq}]")
    if gate is not None and gate.ndim == 1 and experts != 1:
        check_counts(counts, L)
    if window >= 0 and type(frames) is type(video) is int and (frames < 1 or video % frames):
        raise ValueError(f"frames: got {frames} for {video} video tokens, allowed: a divisor of them")
    if window >= 0 and type(L) is type(video) is int and not 0 <= video <= L:
        raise ValueError(f"video: got {video}, allowed: 0 to {L}")
    if inverse is not None and (differ(inverse.shape, (1,)) or inverse.dtype != torch.float32):
        raise ValueError(f"inverse: got {list(inverse.shape)} {inverse.dtype}, allowed: [1] torch.float32")
    return (q.new_empty(q.shape, dtype=arithmetic(q.dtype) if inverse is None else E4M3),)


def _check_codes(q: Tensor, k: Tensor, v: Tensor, scales: Tensor) -> None:
    """Raises ValueError unless they are what attention in eight bits takes."""
    if not q.dtype == k.dtype == v.dtype == E4M3:
        raise ValueError(f"q, k, v: got {q.dtype}, {k.dtype}, {v.dtype}, allowed: {E4M3} with scales")
    if k.ndim != 3:
        raise ValueError(f"k: got {list(k.shape)}, allowed: [S, Hkv, D], one sequence, with scales")
    if differ(v.shape, turned(k.shape)):
        raise ValueError(f"v: got {list(v.shape)}, allowed: {list(turned(k.shape))}, as of transpose_to_codes")
    if differ(scales.shape, (2,)) or scales.dtype != torch.float32:
        raise ValueError(f"scales: got {list(scales.shape)} {scales.dtype}, allowed: [2] torch.float32")


def reference(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, experts: int, counts: Sequence[int], frames: int, video: int,
    window: int, inverse: Tensor | None = None, scales: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """torch's attention, one call a range of queries; the gate, and codes, in at least float32."""
    if scales is not None:
        out = gated(_of_codes(q, k, v, frames, video, window, scales), gate, experts, counts)
        return (out.to(arithmetic(q.dtype)) if inverse is None else codes_of(out, inverse),)
    if inverse is not None:
        q, k, v = (widen(x) for x in (q, k, v))
        (out,) = reference(q, k, v, gate, experts, counts, frames, video, window)
        return (codes_of(out, inverse),)
    if q.ndim == 4:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        return (F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2).contiguous(),)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for queries, keys in key_ranges(frames, video, window, q.shape[-3], k.shape[-3]):
        if queries.stop > queries.start:
            seen = (torch.cat([x[part] for part in keys]) if len(keys) > 1 else x[keys[0]] for x in (k, v))
            query, key, value = (x.transpose(0, 1)[None] for x in (q[queries], *seen))
            out[queries] = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)[0].transpose(0, 1)
    return (gated(out, gate, experts, counts).to(q.dtype),)


def gated(out: Tensor, gate: Tensor | None, experts: int, counts: Sequence[int]) -> Tensor:
    """out [L, Hq, D] times its gate, in at least float32; as it is without one."""
    return out if gate is None else widen(out) * gate_factor(gate, experts, counts, len(out))


def _of_codes(q: Tensor, k: Tensor, v: Tensor, frames: int, video: int, window: int, scales: Tensor) -> Tensor:
    """Attention in eight bits, without its gate: [L, Hq, D] in float32; of codes in float64 exact, weights too."""
    (L, Hq, D), (S, Hkv) = q.shape, k.shape[:2]
    out = torch.zeros(q.shape, dtype=scales.dtype, device=q.device)
    if not S:
        return out
    key, value = widen(k).permute(1, 2, 0), widen(v)  # [Hkv, D, S]
    factor = scales[0] / (D**0.5 * math.log(2))
    for queries, keys in key_ranges(frames, video, window, L, S):
        seen_key, seen_value = (torch.cat([x[..., part] for part in keys], -1) for x in (key, value))
        for first in range(queries.start, queries.stop, step := max(1, SCORES // max(1, Hq * S))):
            block = slice(first, min(first + step, queries.stop))
            heads = widen(q[block]).unflatten(1, (Hkv, -1)).transpose(0, 1)  # [Hkv, rows, Hq / Hkv, D]
            scores = heads.flatten(1, 2) @ seen_key
            weights = ((scores - scores.amax(-1, keepdim=True)) * factor + WEIGHTS).exp2()
            rounded = widen(weights.to(E4M3)) if q.dtype == E4M3 else weights
            made = rounded @ seen_value.transpose(1, 2) * (scales[1] / weights.sum(-1, keepdim=True))
            out[block] = made.view(heads.shape).transpose(0, 1).flatten(1, 2)
    return out


def native_supports(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, experts: int, counts: Sequence[int], frames: int, video: int,
    window: int, inverse: Tensor | None = None, scales: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why the C++ kernel cannot take these inputs, or None."""
    if inverse is not None or scales is not None:
        return "in eight bits"
    if ISAS[0] == "portable":
        return "torch's attention is twice as fast as the portable one"
    given = (q, k, v) if gate is None else (q, k, v, gate)
    if any(x.dtype not in (torch.float32, torch.bfloat16) for x in given):
        return "neither float32 nor bfloat16"
    if k.shape[-3] < 1:
        return "there are no keys"
    if q.ndim == 4 and q.dtype == torch.float32 and 16 * _work(q, k) < 2**20:
        return "torch's attention is faster for so few tokens"
    return refuses(*given)


def native_workspace(q: Tensor, k: Tensor, *_: object, isa: str = ISAS[0]) -> int:
    """Bytes for packed keys and values, and for what each thread works on."""
    (Hq, D), (S, Hkv) = q.shape[-2:], k.shape[-3:-1]
    return _native.attention_workspace(isa, S, Hq, Hkv, D, q.dtype == torch.bfloat16, threads(_work(q, k)))


def _work(q: Tensor, k: Tensor) -> int:
    """Of one sequence, in elements as long as those that are merely read: 16 multiplications each."""
    return q.shape[-3] * q.shape[-2] * q.shape[-1] * k.shape[-3] // 16


def native(
    out: tuple[Tensor], workspace: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, experts: int,
    counts: Sequence[int], frames: int, video: int, window: int, inverse: None = None, scales: None = None,
    isa: str = ISAS[0],
) -> None:  # fmt: skip
    """C++ in the widest instruction set of this CPU; q, k, v may have any strides of rows and heads.

    Where the CPU multiplies bfloat16, the weights of the values are rounded to it; softmax is in float32.
    """
    if q.ndim == 4:
        for each in zip(out[0], q, k, v, strict=True):
            native((each[0],), workspace, *each[1:], None, 1, [], frames, video, window, isa=isa)
        return
    L, Hq, D = q.shape
    own = gate is not None and gate.ndim == 1 and experts != 1  # a gate for each modality
    second, third = first_rows(own, counts, L)
    ranges: list[int] = []
    for rows, keys in key_ranges(frames, video, window, L, k.shape[0]):
        for part in (rows, *keys, slice(0, 0))[:3]:
            ranges += (part.start, part.stop)
    _native.attention(
        isa,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        0 if gate is None else gate.data_ptr(),
        out[0].data_ptr(),
        workspace.data_ptr(),
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        gate.stride(0) if gate is not None and gate.ndim == 2 else 0,
        second,
        third,
        ranges,
        k.shape[0],
        Hq,
        k.shape[1],
        D,
        q.dtype == torch.bfloat16,
        gate is not None and gate.dtype == torch.bfloat16,
        threads(_work(q, k)),
    )


def cost(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, experts: int, counts: Sequence[int], frames: int, video: int,
    window: int, inverse: Tensor | None = None, scales: Tensor | None = None,
) -> Cost:  # fmt: skip
    """Two products over the pairs that see each other; each tensor passes memory once."""
    pairs = sum(
        (rows.stop - rows.start) * sum(part.stop - part.start for part in keys)
        for rows, keys in key_ranges(frames, video, window, q.shape[-3], k.shape[-3])
    )
    result = arithmetic(q.dtype) if inverse is None else E4M3
    moved = (q.numel() + k.numel() + v.numel()) * q.itemsize + q.numel() * result.itemsize
    sequences = q.shape[0] if q.ndim == 4 else 1
    gates = gate.numel() * gate.itemsize if gate is not None else 0
    return Cost(4 * sequences * pairs * q.shape[-2] * q.shape[-1], moved + gates)


ATTENTION = register(
    Op(
        "attention",
        SCHEMA,
        outputs,
        reference,
        cost,
        kernels=(
            Kernel("native", native_supports, native, native_workspace),
            FLASH_3,
            triton_kernel("attention"),
            FLASH_4,
            FLASH_2,
            CUDNN,
            TORCH_FLASH,
        ),
    )
)
