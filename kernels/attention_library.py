"""Attention by other libraries, for GPUs: FlashAttention 2, 3, 4, and what torch carries (cuDNN's, FlashAttention's).

They know neither window nor gate: a call for each range of queries that see the same keys, and a pass for the gate.
None is a dependency. What was read: github.com/Dao-AILab/flash-attention, `flash_attn_func` of each generation.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from horsepower.kernels.attention_ranges import gate_factor, key_ranges
from horsepower.kernels.float8 import codes_of
from horsepower.kernels.registry import Kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, L, Hq, D], k and v [B, S, Hkv, D] -> [B, L, Hq, D]


def flash_attention(name: str, module: str, package: str, majors: Sequence[int], widest: int) -> Kernel:
    """`flash_attn_func` of a module, on GPUs of these major compute capabilities, for heads up to `widest`."""

    @cache
    def function() -> Any:
        try:
            return import_module(module).flash_attn_func
        except (ImportError, AttributeError, OSError):  # not there, of another generation, or built for another torch
            return None

    def supports(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, *_: object) -> str | None:
        if reason := _refuses(q, k, v, gate):
            return reason
        if q.shape[-1] > widest:
            return f"heads of {q.shape[-1]}, allowed: up to {widest}"
        major, minor = torch.cuda.get_device_capability(q.device)
        if major not in majors:
            return f"not made for sm_{major}{minor}"
        return f"{package} is not installed" if function() is None else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor | tuple[Tensor, ...] = function()(q, k, v)  # scale 1 / sqrt(D) and no mask are all defaults
        return made[0] if isinstance(made, tuple) else made  # some give the logarithms of the sums too

    return Kernel(name, supports, writer(attend), devices=("cuda",))


def torch_attention(name: str, attend: Attend, can_use: str) -> Kernel:
    """One of torch's own, called by its operator: to choose it by `sdpa_kernel` would choose it for all threads."""

    def supports(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, *_: object) -> str | None:
        if reason := _refuses(q, k, v, gate):
            return reason
        heads_first = [(x if x.ndim == 4 else x[None]).transpose(1, 2) for x in (q, k, v)]
        parameters: Any = torch.backends.cuda.SDPAParams
        given = parameters(*heads_first, None, 0.0, False, True)
        return None if getattr(torch.backends.cuda, can_use)(given) else "torch's own test of the inputs"

    return Kernel(name, supports, writer(attend), devices=("cuda",))


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `Attend`, by cuDNN."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    made = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, compute_log_sumexp=False)
    return made[0].transpose(1, 2)  # type: ignore[no-any-return]


def torch_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `Attend`, by the FlashAttention that is a part of torch."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(*heads_first)[0].transpose(1, 2)  # type: ignore[no-any-return]


def writer(attend: Attend) -> Callable[..., None]:
    """`Kernel.run` by calls of `attend`."""

    def run(
        out: tuple[Tensor, ...], _workspace: Tensor | None, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None,
        experts: int, counts: Sequence[int], frames: int, video: int, window: int, inverse: Tensor | None = None,
        scales: None = None,
    ) -> None:  # fmt: skip
        if q.ndim == 4:
            out[0].copy_(attend(q, k, v))
            return
        factor = None if gate is None else gate_factor(gate, experts, counts, len(q))
        for queries, keys in key_ranges(frames, video, window, len(q), len(k)):
            if queries.stop > queries.start:
                seen = (torch.cat([x[part] for part in keys]) if len(keys) > 1 else x[keys[0]] for x in (k, v))
                made = attend(q[queries][None], *(x[None] for x in seen))[0]
                if inverse is not None:
                    wide = made.float() if factor is None else made * factor[queries]
                    out[0][queries] = codes_of(wide, inverse)
                elif factor is None:
                    out[0][queries] = made
                else:
                    torch.mul(made, factor[queries], out=out[0][queries])

    return run


def _refuses(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> str | None:
    """Why none of them can take these inputs, or None."""
    if not all(x.is_cuda for x in (q, k, v, gate) if x is not None):
        return "not on a GPU"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "neither bfloat16 nor float16"
    if q.shape[-1] % 8:
        return f"head dimension {q.shape[-1]}, not a multiple of 8"
    if k.shape[-3] < 1:
        return "there are no keys"
    return "the last dimension is not contiguous" if any(x.stride(-1) != 1 for x in (q, k, v)) else None


FLASH_2 = flash_attention("flash_attention_2", "flash_attn", "flash-attn", (8, 9), 256)
FLASH_3 = flash_attention("flash_attention_3", "flash_attn_interface", "flash-attn-3", (9,), 256)
FLASH_4 = flash_attention("flash_attention_4", "flash_attn.cute", "flash-attn-4", (9, 10, 11), 128)
CUDNN = torch_attention("cudnn", cudnn, "can_use_cudnn_attention")
TORCH_FLASH = torch_attention("torch_flash", torch_flash, "can_use_flash_attention")
