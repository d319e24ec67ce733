"""How kernels are started: on which device, and how often they are compiled."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from horsepower.kernels.gpu.launch import Config, launch


def test_a_kernel_starts_on_the_device_of_its_operands(monkeypatch):
    """Triton starts it on the current one, whatever pointers it is given."""
    devices = [0]

    def exchange(device):
        devices.append(device)
        return devices[-2]

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: devices.append("start")

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    with FakeTensorMode():
        x = torch.empty(3, device="cuda:1")
    for operand in (x, SimpleNamespace(base=x)):
        launch(Kernel(), (1,), operand, config=Config(1))
    assert devices == [0, *2 * [1, "start", 0]]


SCRIPT = """
import torch
import triton
from horsepower.kernels import ops
from horsepower.kernels.gate import twins
from horsepower.kernels.gpu.launch import compiled
from horsepower.kernels.registry import OPS
from horsepower.kernels.transpose_to_codes import turned
from importlib import import_module

found = {}
triton.knobs.runtime.jit_cache_hook = lambda key, fn, **_: found.setdefault(fn.name, set()).add(key) or True  # skip it

def at(inputs, tokens):
    counts = [tokens - tokens // 2, tokens // 2 - tokens // 3, tokens // 3]
    shorter = [x.new_empty_strided((tokens, *x.shape[1:]), x.stride()) if is_rows(x) else x for x in inputs]
    return [counts if x == [4000, 100, 200] or x == [4160, 100, 40] else x for x in shorter]

def is_rows(x):
    return isinstance(x, torch.Tensor) and x.shape[0] == 4300

for name in twins():
    op, twin = OPS[name], import_module(f"horsepower.kernels.gpu.{name}")
    for label, inputs in twin.examples():
        found.clear()
        pieces = name in ("activation", "silu_mul")  # which an odd number of values compiles anew, once
        for tokens in (2, 16, 18, 48, 4300, 65536) if pieces else (1, 2, 16, 17, 48, 4300, 65536):
            given = at(inputs, tokens)
            if name == "attention":  # frames and tokens of each
                given[6:8] = tokens // 2 or 1, tokens // 2 * 2 or 1
                if len(given) > 10:  # of codes, with scales
                    given[2] = given[2].new_empty(turned(given[1].shape))
            workspace = torch.empty(op.workspace(["cuda"], *given), dtype=torch.uint8, device="meta")
            compiled("sm_90", lambda: twin.run(op.outputs(*given), workspace, *given))
        assert found
        for kernel, keys in found.items():
            assert len(keys) == 1, (kernel, label, keys)
"""


def test_prompts_of_other_lengths_do_not_compile_again():
    """Rows, where modalities begin, frames: none of them is a part of what a kernel is compiled for."""
    pytest.importorskip("triton.backends.nvidia")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
