"""The pre-key of a plan: everything that decides it, hashed without tracing.

Forward sources and what they refer to, attributes, shapes and dtypes, example inputs, passes, the compiler's and the
kernels' own sources, versions, the target, the scheme.
"""

import functools
import hashlib
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from horsepower import _native
from horsepower.graph.code import UnkeyedError, Walk, code_digest
from horsepower.graph.repeats import attributes
from horsepower.kernels import tables
from horsepower.kernels.native_library import ISAS
from horsepower.quant.scheme import Scheme


def key_of(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    method: str,
    passes: Sequence[Callable[..., Any]],
    target: str = "cpu",
    scheme: Scheme | None = None,
) -> str:
    """64 hexadecimal digits. Raises UnkeyedError."""
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        for part in parts:
            digest.update(str(part).encode())
            digest.update(b"\0")

    add(torch.__version__, platform.python_version(), platform.machine(), ISAS, _own_sources())
    add(torch.get_default_dtype(), torch.get_default_device())
    add(torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    add(target, scheme, method, *map(_pass_name, passes))
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    walk = Walk(module, method)
    add(spec, *(_leaf(leaf, walk) for leaf in leaves), walk.text(dynamic_shapes, "dynamic_shapes"))
    names: dict[int, str] = {}  # of tensors: shared ones are one
    for path, each in module.named_modules(remove_duplicate=False):
        add(path, *_describe(path, each, names, walk))
    add(*walk.lines())
    return digest.hexdigest()


def _describe(path: str, module: nn.Module, names: dict[int, str], walk: Walk) -> Iterator[str]:
    """One module without its children."""
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        if getattr(module, hooks):
            raise UnkeyedError(f"{path or 'module'}: it has forward hooks")
    yield f"{type(module).__module__}.{type(module).__qualname__}"
    for name, value in attributes(module):
        yield f"{name} = {walk.text(value, f'{path}.{name}'.lstrip('.'))}"
    for kind in (module._modules, module._parameters, module._buffers):
        for name, x in kind.items():
            if x is None:
                yield f"{name}: None"
            elif isinstance(x, Tensor):
                first = names.setdefault(id(x), f"{path}.{name}")
                yield f"{name}: {first} {tuple(x.shape)} {x.stride()} {x.dtype} {x.device} {type(x).__qualname__}"
                yield f"{x.requires_grad} {walk.text(vars(x), f'{path}.{name}'.lstrip('.'))}"
    yield f"not saved: {sorted(module._non_persistent_buffers_set)}"


def _leaf(leaf: Any, walk: Walk) -> str:
    if isinstance(leaf, Tensor):
        return f"{tuple(leaf.shape)} {leaf.stride()} {leaf.dtype} {leaf.device} {leaf.requires_grad}"
    return walk.text(leaf, "example_inputs")


def _pass_name(function: Callable[..., Any]) -> str:
    """A pass by its name, if it is one of the compiler's own."""
    name, home = getattr(function, "__name__", "?"), sys.modules.get(getattr(function, "__module__", ""))
    if home is None or not home.__name__.startswith("horsepower.graph") or getattr(home, name, None) is not function:
        raise UnkeyedError(f"only: {name} is no pass of the compiler's own")
    return f"{home.__name__}.{name} {code_digest(function.__code__)}"


@functools.cache
def _own_sources() -> str:
    """Of the compiler and the kernels, compiled ones included, with what was measured of them."""
    root = Path(__file__).parents[1]
    sources = [path for folder in ("graph", "quant", "kernels") for path in sorted(root.glob(f"{folder}/**/*.py"))]
    files = [*sources, *sorted(tables.FOLDER.glob("*.json")), Path(_native.__file__)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
