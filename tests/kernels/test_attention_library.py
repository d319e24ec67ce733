"""Other libraries' attention: the layouts and arguments they get, by stand-ins with their published signatures."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from exactness import check_exactness
from horsepower.kernels import attention_library
from horsepower.kernels.attention import ATTENTION, outputs, reference
from horsepower.kernels.attention_library import cudnn, flash_attention, torch_flash

BF16 = torch.bfloat16
FULL = (1, [], 1, 0, -1)  # experts, counts, frames, video, window


def attention(q, k, v):
    """By torch: [B, L, Hq, D], 2 x [B, S, Hkv, D], contiguous in the last dimension."""
    assert q.ndim == k.ndim == v.ndim == 4
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2)


def second(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    assert (dropout_p, softmax_scale, causal, window_size, softcap) == (0.0, None, False, (-1, -1), 0.0)
    return attention(q, k, v)


def third(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, window_size=(-1, -1)):
    assert (softmax_scale, causal, qv, q_descale, window_size) == (None, False, None, None, (-1, -1))
    return attention(q, k, v)


def fourth(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, return_lse=False):
    assert (softmax_scale, causal, window_size, learnable_sink) == (None, False, (None, None), None)
    return attention(q, k, v), None


def inputs(rows, gate=None):
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(rows, 8 * 16 + 4, generator=generator).to(BF16)
    q, k, v = projection[:, :-4].unflatten(1, (8, 16)).split([4, 2, 2], 1)
    return q, k, v, None if gate is None else torch.randn(gate, generator=generator)


@pytest.mark.parametrize(
    ("module", "stand_in"), [("flash_attn", second), ("flash_attn_interface", third), ("flash_attn.cute", fourth)]
)
def test_the_packages(monkeypatch, module, stand_in):
    for i in range(module.count(".") + 1):
        monkeypatch.setitem(sys.modules, module.rsplit(".", i)[0], ModuleType(module.rsplit(".", i)[0]))
    sys.modules[module].flash_attn_func = stand_in
    kernel = flash_attention("one", module, "its package", (9,), 128)
    for arguments in (
        (*inputs(23), *FULL),
        (*inputs(23, (23, 4)), *FULL),
        (*inputs(23, (4,)), *FULL),
        (*inputs(23, (12,)), 3, [15, 0, 8], 3, 15, 0),
        (*(x[None].expand(2, -1, -1, -1) for x in inputs(9)[:3]), None, *FULL),
        (*inputs(0), *FULL),
    ):
        out = outputs(*arguments)
        out[0].fill_(torch.nan)
        kernel.run(out, None, *arguments)
        wide = [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]
        check_exactness(out[0], reference(*arguments)[0], reference(*wide)[0])


@pytest.mark.parametrize("attend", [cudnn, torch_flash])
def test_torch_takes_these_arguments(attend):
    q, k, v = (torch.empty(1, n, h, 64, dtype=BF16, device="meta") for n, h in ((7, 4), (9, 4), (9, 4)))
    assert attend(q, k, v).shape == q.shape


def test_what_is_absent_or_elsewhere_is_refused(monkeypatch):
    arguments = inputs(5)
    libraries = [kernel for kernel in ATTENTION.kernels if kernel.name not in ("native", "triton")]
    assert [kernel.supports(*arguments) for kernel in libraries] == ["not on a GPU"] * 5
    monkeypatch.setattr(attention_library, "_refuses", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setitem(sys.modules, "absent", None)
    made = flash_attention("one", "absent", "its package", (8, 9), 16)
    assert made.supports(*arguments) == "its package is not installed"
    assert flash_attention("one", "absent", "p", (9,), 16).supports(*arguments) == "not made for sm_80"
    assert flash_attention("one", "absent", "p", (8,), 8).supports(*arguments) == "heads of 16, allowed: up to 8"
