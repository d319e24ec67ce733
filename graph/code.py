"""The code that a call can reach, as text that is the same in every process: functions by what they compute.

It is followed by name, from the entry method through globals, closures and attributes. What changes a name's meaning
at run time (a replaced function, another constant) shows, a comment does not.
"""

import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from horsepower.graph.repeats import attributes

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
# Versions stand for the first, and a digest of its files for the compiler itself.
_COVERED = {"torch", "numpy", "sympy", "triton", "typing_extensions", *sys.stdlib_module_names}
# Special methods that a call does not go through.
_SILENT = {
    "__doc__", "__module__", "__qualname__", "__annotations__", "__repr__", "__str__", "__dir__", "__hash__",
    "__init_subclass__", "__class_getitem__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__",
    "__firstlineno__", "__static_attributes__", "__match_args__", "__dataclass_params__", "__slots__",
}  # fmt: skip
_CONSTRUCTION = {"__init__", "__new__", "__post_init__", "__setattr__"}
_OURS = ("horsepower.graph", "horsepower.kernels", "horsepower._native")


class UnkeyedError(ValueError):
    """Something that decides a plan cannot be told apart across processes; the message names it."""


def reachable(module: nn.Module, method: str) -> list[str]:
    """One line a function or constant that `module.method` may use. Raises UnkeyedError."""
    walk = _Walk()
    walk.names |= {method, "forward"}
    for path, each in module.named_modules():
        walk.add_class(type(each), made=False)
        for name, value in attributes(each):
            walk.add(f"{path}.{name}".lstrip("."), value)
    walk.run()
    return sorted(walk.lines)


def code_digest(code: types.CodeType) -> str:
    """Of what a code object does: its line numbers and comments do not count."""
    text = repr((code.co_code, _constant(code.co_consts), code.co_names, code.co_varnames, code.co_freevars))
    return hashlib.sha256(text.encode()).hexdigest()


class _Walk:
    """Everything met so far: functions and classes that are to be read, and the names that were used."""

    def __init__(self) -> None:
        self.lines: set[str] = set()
        self.names: set[str] = set()
        self._classes: dict[type, bool] = {}  # whether the code may make objects of it
        self._functions: list[types.FunctionType] = []
        self._seen: set[int] = set()

    def run(self) -> None:
        """Until nothing new is met: a name may be a method of a class that is met later."""
        before = -1
        while before != len(self._seen):
            before = len(self._seen)
            for cls, made in list(self._classes.items()):
                for name, value in vars(cls).items():
                    special = name.startswith("__") and name not in _SILENT and (made or name not in _CONSTRUCTION)
                    if special or name in self.names:
                        self._add_member(cls, name, value)
            while self._functions:
                self._read(self._functions.pop())

    def add_class(self, cls: type, made: bool) -> None:
        for base in cls.__mro__:
            if not _is_covered(base.__module__):
                self._classes[base] = self._classes.get(base, False) or made

    def _add_member(self, cls: type, name: str, value: Any) -> None:
        if isinstance(value, property):
            for part in (value.fget, value.fset):
                self.add(f"{cls.__qualname__}.{name}", part)
        else:
            self.add(f"{cls.__qualname__}.{name}", getattr(value, "__func__", value))

    def add(self, where: str, value: Any) -> None:
        """A value that a name stands for."""
        if isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.add(where, part)
        elif isinstance(value, type):
            self.add_class(value, made=True)
        elif callable(value) and isinstance(inspect.unwrap(value), types.FunctionType):
            for function in (value, inspect.unwrap(value)):
                if isinstance(function, types.FunctionType) and id(function) not in self._seen:
                    self._seen.add(id(function))
                    if not _is_covered(function.__module__ or ""):
                        self._functions.append(function)
            self.lines.add(f"{where} is {getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}")
        elif isinstance(value, Tensor):
            self.lines.add(f"{where} = {tensor_text(value, where)}")
        elif is_data(value):
            self.lines.add(f"{where} = {data_text(value)}")
        elif isinstance(value, list | tuple):
            for part in value:
                self.add(where, part)
        elif type(value) is dict:
            for key, part in value.items():
                self.add(f"{where}[{key!r}]", part)
        elif isinstance(value, nn.Module):
            raise UnkeyedError(f"{where}: a module that is no submodule")
        elif not isinstance(value, types.ModuleType):
            self.add_class(type(value), made=False)

    def _read(self, function: types.FunctionType) -> None:
        home = f"{function.__module__}.{function.__qualname__}"
        self.lines.add(f"{home} {code_digest(function.__code__)}")
        for i, value in enumerate((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())):
            self.add(f"{home} default {i}", value)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.add(f"{home} {name}", _content(cell))
        used = set(_names(function.__code__))
        self.names |= used
        for name in used:
            found = function.__globals__.get(name, sys.modules.get(name))
            if isinstance(found, types.ModuleType):
                if not _is_covered(found.__name__):
                    for attribute in used & vars(found).keys():
                        self.add(f"{found.__name__}.{attribute}", vars(found)[attribute])
            elif name in function.__globals__:
                self.add(f"{function.__module__}.{name}", found)


def is_data(value: Any, depth: int = 0) -> bool:
    """Whether it is made of constants and Python's own containers alone; others may do anything when they are read."""
    if type(value) is dict:
        return depth < 8 and all(is_data(part, depth + 1) for pair in value.items() for part in pair)
    if type(value) in (list, tuple, set, frozenset):
        return depth < 8 and all(is_data(part, depth + 1) for part in value)
    return isinstance(value, PLAIN)


def data_text(value: Any) -> str:
    """Data as text; the order of a set is not the same in every process."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{data_text(k)}: {data_text(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple | set | frozenset):
        parts = map(data_text, value)
        return f"{type(value).__name__} {sorted(parts) if isinstance(value, set | frozenset) else list(parts)}"
    return f"{type(value).__name__} {value!r}"


def tensor_text(x: Tensor, where: str) -> str:
    """A tensor that is no parameter or buffer: its values are constants of the plan. Raises UnkeyedError."""
    if x.device.type != "cpu" or x.numel() > 2**20:
        raise UnkeyedError(f"{where}: a tensor that is no buffer, on {x.device} or with more than 2**20 values")
    data = x.detach().contiguous().flatten().view(torch.uint8) if x.numel() else x
    return f"{tuple(x.shape)} {x.dtype} {hashlib.sha256(data.numpy().tobytes()).hexdigest()}"


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return code_digest(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant, value))})"
    return data_text(value)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _names(const)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _is_covered(module: str) -> bool:
    return not module or module.partition(".")[0] in _COVERED or module.startswith(_OURS)
