"""The pre-key of a plan: everything that decides it, hashed without tracing.

Forward sources and what they refer to, attributes, shapes and dtypes, example inputs, passes, the compiler's and the
kernels' own sources, versions, the target.
"""

import enum
import functools
import hashlib
import platform
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from horsepower import _native
from horsepower.graph.code import PLAIN, UnkeyedError, code_digest, reachable, tensor_text
from horsepower.graph.repeats import attributes
from horsepower.kernels.native_library import ISAS

_UNORDERED = ("_use_default_values",)  # diffusers keeps a set there as a list; it decides nothing


def key_of(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    method: str,
    passes: Sequence[Callable[..., Any]],
) -> str:
    """64 hexadecimal digits. Raises UnkeyedError."""
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        for part in parts:
            digest.update(str(part).encode())
            digest.update(b"\0")

    add(torch.__version__, platform.python_version(), platform.machine(), ISAS, _own_sources())
    add(torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    add(method, *map(_pass_name, passes))
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    add(spec, *(_leaf(leaf) for leaf in leaves), _text(dynamic_shapes, "dynamic_shapes"))
    names: dict[int, str] = {}  # of tensors: shared ones are one
    for path, each in module.named_modules(remove_duplicate=False):
        add(path, *_describe(path, each, names))
    add(*reachable(module, method))
    return digest.hexdigest()


def _describe(path: str, module: nn.Module, names: dict[int, str]) -> Iterator[str]:
    """One module without its children."""
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        if getattr(module, hooks):
            raise UnkeyedError(f"{path or 'module'}: it has forward hooks")
    yield f"{type(module).__module__}.{type(module).__qualname__}"
    for name, value in attributes(module):
        yield f"{name} = {_text(value, f'{path}.{name}'.lstrip('.'))}"
    for kind in (module._parameters, module._buffers):
        for name, x in kind.items():
            if x is not None:
                first = names.setdefault(id(x), f"{path}.{name}")
                yield f"{name}: {first} {tuple(x.shape)} {x.stride()} {x.dtype} {x.device} {type(x).__qualname__}"


def _leaf(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{tuple(leaf.shape)} {leaf.stride()} {leaf.dtype} {leaf.device} {leaf.requires_grad}"
    return _text(leaf, "example_inputs")


def _text(value: Any, where: str, depth: int = 0) -> str:
    """A value as text that is the same in every process. Raises UnkeyedError for what has none."""
    if depth > 12:
        raise UnkeyedError(f"{where}: it is nested too deeply")
    inner = functools.partial(_text, where=where, depth=depth + 1)
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, PLAIN):
        return f"{name} {value!r}"
    if isinstance(value, enum.Enum):
        return f"{name} {value.name}"
    if isinstance(value, Mapping):
        return f"{name} {{{', '.join(f'{inner(k)}: {inner(v)}' for k, v in value.items() if k not in _UNORDERED)}}}"
    if isinstance(value, list | tuple):
        return f"{name} [{', '.join(map(inner, value))}]"
    if isinstance(value, set | frozenset):
        return f"{name} {{{', '.join(sorted(map(inner, value)))}}}"
    if isinstance(value, type):
        return f"type {value.__module__}.{value.__qualname__}"
    if isinstance(value, types.FunctionType):
        return f"function {value.__module__}.{value.__qualname__} {code_digest(value.__code__)}"
    if isinstance(value, functools.partial):
        return f"partial {inner(value.func)} {inner(value.args)} {inner(value.keywords)}"
    if isinstance(value, types.BuiltinFunctionType):
        return f"builtin {value.__module__}.{value.__qualname__}"
    if isinstance(value, Tensor):
        return tensor_text(value, where)
    if is_dataclass(value):
        return f"{name} {inner({field.name: getattr(value, field.name) for field in fields(value)})}"
    if type(value).__module__.startswith("torch.export"):
        return f"{name} {value!r} {getattr(value, 'min', None)} {getattr(value, 'max', None)}"
    if not isinstance(value, nn.Module) and hasattr(value, "__dict__"):
        return f"{name} {inner(vars(value))}"
    raise UnkeyedError(f"{where}: a {name} has no text that is the same in every process")


def _pass_name(function: Callable[..., Any]) -> str:
    """A pass by its name, if it is one of the compiler's own."""
    name, home = getattr(function, "__name__", "?"), sys.modules.get(getattr(function, "__module__", ""))
    if home is None or not home.__name__.startswith("horsepower.graph") or getattr(home, name, None) is not function:
        raise UnkeyedError(f"only: {name} is no pass of the compiler's own")
    return f"{home.__name__}.{name} {code_digest(function.__code__)}"


@functools.cache
def _own_sources() -> str:
    """Of the compiler and the kernels, compiled ones included."""
    root = Path(__file__).parents[1]
    files = [*sorted(root.glob("graph/**/*.py")), *sorted(root.glob("kernels/**/*.py")), Path(_native.__file__)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
