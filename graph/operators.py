"""Operators by name, and how a call writes its results into memory that is given."""

import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from horsepower.kernels.registry import Write, op_of

_COPIES = ("aten.to.dtype", "aten._to_copy.default", "aten.clone.default", "aten.contiguous.default")


def name_of(target: Any) -> str:
    """An operator's name: aten.linear.default, _operator.getitem."""
    return str(target) if isinstance(target, torch._ops.OpOverload) else f"{target.__module__}.{target.__name__}"


@cache
def operator_of(name: str) -> Callable[..., Any]:
    """The inverse of `name_of`. Raises ValueError for a name that stands for no operator without side effects."""
    namespace, *path = name.split(".")
    found: Any = None
    if namespace == "_operator" and len(path) == 1:
        found = getattr(operator, path[0], None)
    elif namespace == "math" and len(path) == 1:
        found = getattr(math, path[0], None)
    elif namespace == "torch" and len(path) == 1 and path[0].startswith("sym_"):
        found = getattr(torch, path[0], None)
    elif len(path) == 2:
        found = getattr(getattr(getattr(torch.ops, namespace), path[0], None), path[1], None)
        if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
            found = None
    if found is None:
        raise ValueError(f"operator: got {name!r}, which this build does not know as one without side effects")
    return found  # type: ignore[no-any-return]


@cache
def writer_of(name: str) -> Write | None:
    """How an operator's results are written into given tensors; None if only the operator can make them."""
    if op := op_of(name):
        return op.write
    if name == "aten.linear.default":
        return _write_linear
    if name in _COPIES:
        return lambda outputs, _, x, *__, **___: outputs[0].copy_(x)
    target = operator_of(name)
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if (found := _out_overload(target)) is None:
        return None
    variant, names = found

    def write(outputs: tuple[Tensor, ...], _workspace: Tensor | None, *args: Any, **kwargs: Any) -> None:
        variant(*args, **kwargs, **dict(zip(names, outputs, strict=True)))

    return write


def _write_linear(
    outputs: tuple[Tensor, ...], _workspace: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> None:
    """One matrix product over all rows; torch's own `linear.out` makes a batch of them, up to fifty times slower."""
    (out,) = outputs
    if out.ndim < 2 or not out.is_contiguous():
        out.copy_(F.linear(x, weight, bias))
        return
    rows, into = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if bias is None:
        torch.mm(rows, weight.t(), out=into)
    else:
        torch.addmm(bias, rows, weight.t(), out=into)


def _out_overload(target: torch._ops.OpOverload) -> tuple[Callable[..., Any], list[str]] | None:
    """The overload that differs in nothing but the outputs that it is given, and their names."""
    packet, schema = target.overloadpacket, target._schema
    if not all(str(result.type) == "Tensor" for result in schema.returns):
        return None
    for overload in packet.overloads():
        variant = getattr(packet, overload)
        outs = [argument.name for argument in variant._schema.arguments if argument.is_out]
        rest = [(a.name, str(a.type)) for a in variant._schema.arguments if not a.is_out]
        if len(outs) == len(schema.returns) > 0 and rest == [(a.name, str(a.type)) for a in schema.arguments]:
            return variant, outs
    return None
