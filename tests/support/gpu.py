"""Where Triton's kernels are tested, and how: on a GPU, or else in the interpreter."""

import json
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from exactness import check_exactness
from horsepower.kernels.gpu.launch import Config
from horsepower.kernels.registry import Op
from horsepower.kernels.tables import arguments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(op: Op, twin: ModuleType, *inputs: Any, config: Config | None = None) -> tuple[Tensor, ...]:
    """The twin writes every result, none further from float64 than the reference; outputs and workspace are poisoned.

    `config`: another than the default one.
    """
    assert twin.supports(*inputs) is None
    outputs = op.outputs(*inputs)
    for output in outputs:
        output.fill_(torch.nan)
    twin.run(outputs, workspace(op, *inputs), *inputs, config=config)
    for got, eager, exact in zip(outputs, op.reference(*inputs), op.reference(*widened(op, *inputs)), strict=True):
        check_exactness(got, eager, exact)
    return outputs


def apart(script: str) -> Any:
    """What a script prints as JSON, in a process of its own: it neither interprets kernels nor has a GPU's driver."""
    pytest.importorskip("triton.backends.nvidia")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def workspace(op: Op, *inputs: Any) -> Tensor | None:
    """What the twin asks for, filled with NaN."""
    kernel = next(each for each in op.kernels if each.name == "triton")
    size = kernel.workspace(*inputs) if kernel.workspace else 0
    return torch.full((size,), 255, dtype=torch.uint8, device=DEVICE) if size else None


def widened(op: Op, *inputs: Any) -> list[Any]:
    """The inputs in float64, codes times their scales."""
    named = dict(zip(arguments(op.schema), inputs, strict=False))
    scales = {name: named.pop(f"{name}_scale", None) for name in ("x", "weight")}
    wide = {name: _wide(value) for name, value in named.items()}
    return list((wide | {name: wide[name] * scale for name, scale in scales.items() if scale is not None}).values())


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if isinstance(value, torch.dtype) else value
