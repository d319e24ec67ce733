"""The code and the values that a call can reach, as text that is the same in every process.

Code is followed by name, from the entry method through globals, closures and attributes. What changes a name's meaning
at run time (a replaced function, another constant) shows, a comment does not. Values are written out to their last
part; what cannot be is an error. Not seen: a class attribute whose name is computed (`getattr(self, "a" + "b")`), a
module that a function imports for the first time, and what someone replaces inside torch or the standard library.
"""

import contextvars
import copyreg
import dis
import enum
import functools
import hashlib
import itertools
import logging
import operator
import os
import re
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef

from horsepower.graph.repeats import attributes

_PLAIN = {bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented)}
_PLAIN |= {torch.dtype, torch.device, torch.layout, torch.memory_format}
# Versions stand for the first, and a digest of its files for the compiler itself.
_COVERED = {"torch", "numpy", "sympy", "triton", "typing_extensions", *sys.stdlib_module_names}
_COVERED -= {"types"}  # where classes made by dataclasses.make_dataclass say they are from
# Special methods that a call does not go through.
_SILENT = {
    "__doc__", "__module__", "__qualname__", "__annotations__", "__repr__", "__str__", "__dir__", "__hash__",
    "__init_subclass__", "__class_getitem__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__",
    "__weakref__", "__dict__", "__orig_bases__", "__parameters__", "__abstractmethods__",
    "__firstlineno__", "__static_attributes__", "__match_args__", "__dataclass_params__", "__slots__",
}  # fmt: skip
_CONSTRUCTION = {"__init__", "__new__", "__post_init__", "__setattr__"}
_OURS = ("horsepower.graph", "horsepower.kernels", "horsepower._native")

_UNORDERED = "_use_default_values"  # diffusers keeps a set there as a list; it decides nothing
_ENVIRONMENT = {"environ", "getenv"}
_IMPORTING = {"import_module", "__import__", "modules"}
_VARIABLE = re.compile("[A-Z][A-Z0-9_]*")
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_SLOTS = (
    types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)
_COPYING = ("__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs__", "__getnewargs_ex__")
_DISPATCH = {"dispatch_cache", "cache_token"}  # of functools.singledispatch: filled by calls
_DEPTH = 40


class UnkeyedError(ValueError):
    """Something that decides a plan cannot be told apart across processes; the message names it."""


def code_digest(code: types.CodeType) -> str:
    """Of what a code object does: its line numbers and comments do not count."""
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    text = repr((code.co_code, code.co_exceptiontable, _constant(code.co_consts), counts, names))
    return hashlib.sha256(text.encode()).hexdigest()


class Walk:
    """Everything that calls of `module.method` may use: what is met is written as text, and its code is read."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self._paths = {id(each): path for path, each in module.named_modules()}
        self._lines: set[str] = set()
        self._names = {method, "forward"}
        self._classes: dict[type, bool] = {}  # whether the code may make objects of it
        self._called: dict[str, type] = {}
        self._globals: dict[str, dict[str, Any]] = {}
        self._modules: dict[str, types.ModuleType] = {}
        self._members: set[str] = set()
        self._functions: dict[int, types.FunctionType] = {}
        self._unread: list[types.FunctionType] = []
        for each in module.modules():
            self._add_class(type(each), made=False)

    def lines(self) -> list[str]:
        """One a constant or class member that is reached from the values written so far. Raises UnkeyedError."""
        before = (-1, -1, -1)
        while before != (now := (len(self._functions), len(self._names), len(self._lines))):
            before = now  # a name may be a method of a class met later
            for cls, made in list(self._classes.items()):
                home = f"{cls.__module__}.{cls.__qualname__}"
                for name in list(vars(cls)):
                    special = name.startswith("__") and name not in _SILENT and (made or name not in _CONSTRUCTION)
                    if special or name in self._names:
                        self._add(home, name, vars(cls))
            for module in list(self._modules.values()):
                self._add_module(module, self._names, set())
            while self._unread:
                self._read(self._unread.pop())
        return sorted(self._lines)

    def text(self, value: Any, where: str) -> str:
        """A value with all it consists of; functions and classes in it are queued to be read. Raises UnkeyedError."""
        return _Writer(self, where, {}).text(value)

    def _add(self, home: str, name: str, names: Mapping[str, Any]) -> None:
        """What a name stands for at home: in a module or a class."""
        where = f"{home}.{name}"
        if where not in self._members:
            self._members.add(where)
            self._lines.add(f"{where} = {self.text(names[name], where)}")

    def _add_module(self, module: types.ModuleType, used: set[str], seen: set[str]) -> None:
        """What the used names stand for in a module, and in modules in it."""
        if not _is_covered(module.__name__) and module.__name__ not in seen:
            seen.add(module.__name__)
            for name in used & vars(module).keys():
                self._add_variable(module.__name__, name, vars(module), used, seen)

    def _add_variable(self, home: str, name: str, names: dict[str, Any], used: set[str], seen: set[str]) -> None:
        found = names[name]
        if isinstance(found, types.ModuleType):
            self._lines.add(f"{home}.{name} is {found.__name__}")
            self._add_module(found, used, seen)
        else:
            self._add(home, name, names)

    def _add_class(self, cls: type, made: bool) -> None:
        meta: type = type(cls)
        for base in (*cls.__mro__, *meta.__mro__):
            if not _is_covered(base.__module__):
                name = f"{base.__module__}.{base.__qualname__}"
                if self._called.setdefault(name, base) is not base:
                    raise UnkeyedError(f"{name}: two classes of this name")
                up = [f"{each.__module__}.{each.__qualname__}" for each in (*base.__mro__, type(base))]
                self._lines.add(f"{name} is {up}")
                self._classes[base] = self._classes.get(base, False) or made

    def _add_function(self, function: types.FunctionType) -> None:
        home = _home(function)
        if id(function) not in self._functions and not _is_covered(home):
            if self._globals.setdefault(home, function.__globals__) is not function.__globals__:
                raise UnkeyedError(f"{home}: two modules of this name")
            self._functions[id(function)] = function
            self._unread.append(function)

    def _read(self, function: types.FunctionType) -> None:
        codes = list(_codes(function.__code__))
        strings = {text for code in codes for text in code.co_consts if isinstance(text, str)}
        used = {name for code in codes for name in code.co_names} | strings  # getattr may be given a string
        self._names |= used
        if used & _ENVIRONMENT:
            self._add_environment(function, strings)
        home = _home(function)
        variables, imports = (set().union(*names) for names in zip(*map(_variables_imports, codes), strict=True))
        if used & _IMPORTING:
            imports |= strings
        if "globals" in variables and home in sys.modules:
            self._modules[home] = sys.modules[home]
        for name in variables & function.__globals__.keys():
            self._add_variable(home, name, function.__globals__, used, set())
        parents = list(itertools.accumulate(home.split("."), "{}.{}".format))
        for name in imports:
            for path in (name, *(f"{parent}.{name}".rstrip(".") for parent in parents)):  # it may be a relative one
                if isinstance(found := sys.modules.get(path), types.ModuleType):
                    self._add_module(found, used, set())

    def _add_environment(self, function: types.FunctionType, strings: set[str]) -> None:
        """The variables that it names."""
        names = set(filter(_VARIABLE.fullmatch, strings))
        if not names:
            raise UnkeyedError(f"{function.__module__}.{function.__qualname__}: it reads the environment")
        self._lines |= {f"variable {name} = {os.environ.get(name)!r}" for name in names}


class _Writer:
    """One value as text. An object that comes again is written as a number, so that cycles end."""

    def __init__(self, walk: Walk, where: str, seen: dict[int, tuple[int, Any]], depth: int = 0) -> None:
        self._walk = walk
        self._where = where
        self._seen = seen  # the objects too, or another one could get the id of one that is gone
        self._depth = depth

    def text(self, value: Any) -> str:
        kind = type(value)
        if kind in _PLAIN:
            if kind is str:
                self._walk._names.add(value)  # getattr may be given it
            return f"{kind.__name__} {value!r}"
        if isinstance(value, type) and not isinstance(value, enum.EnumMeta):
            self._walk._add_class(value, made=True)
            return f"type {value.__module__}.{value.__qualname__}"
        if id(value) in self._seen:
            return f"#{self._seen[id(value)][0]}"
        self._seen[id(value)] = len(self._seen), value
        if self._depth > _DEPTH:
            raise self._unkeyed("it is nested too deeply")
        self._walk._add_class(kind, made=False)
        self._depth += 1
        text = f"{kind.__module__}.{kind.__qualname__} {self._content(value)}"
        self._depth -= 1
        return text

    def _content(self, value: Any) -> str:
        if isinstance(value, types.ModuleType):
            self._walk._modules[value.__name__] = value
            return value.__name__
        named = _named(value)
        if named is not None:
            return named
        if isinstance(value, enum.EnumMeta):  # its members may be met without their names
            self._walk._add_class(value, made=True)
            members: Mapping[str, Any] = value.__members__
            values = self._items((name, member._value_) for name, member in members.items())
            return f"{value.__module__}.{value.__qualname__} {values}"
        if isinstance(value, enum.Enum):
            return f"{value._name_} {self.text(value._value_)}"
        if isinstance(value, Tensor):
            return tensor_text(value, self._where)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return self._all((value.__func__, value.__self__))
        if isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            return f"{value.__qualname__} {self.text(value.__self__)}"
        if isinstance(value, property):
            return self._all((value.fget, value.fset))
        if isinstance(value, staticmethod | classmethod | functools._lru_cache_wrapper):
            return self.text(value.__wrapped__)
        if isinstance(value, types.GeneratorType):
            inside = value.gi_frame.f_locals if value.gi_frame else {}
            return f"{code_digest(value.gi_code)} {self._items(inside.items())}"
        if isinstance(value, contextvars.ContextVar):
            return f"{value.name} {self.text(value.get(None))}"
        if isinstance(value, CustomOpDef):
            return f"{value._qualname} {self.text(value._init_fn)}"
        if type(value) in (dict, types.MappingProxyType):
            return self._items(value.items())
        if type(value) in (set, frozenset):
            return self._set(value)
        if type(value) is list or isinstance(value, tuple):
            return self._all((*value, vars(value)) if getattr(value, "__dict__", None) else value)
        return self._object(value)

    def _all(self, values: Iterable[Any]) -> str:
        return f"[{', '.join(map(self.text, values))}]"

    def _items(self, items: Iterable[tuple[Any, Any]]) -> str:
        pairs = ((key, part) for key, part in items if not (isinstance(key, str) and key == _UNORDERED))
        return f"{{{', '.join(f'{self.text(key)}: {self.text(part)}' for key, part in pairs)}}}"

    def _set(self, values: Iterable[Any]) -> str:
        """Its order is not the same in every process: the numbers in a part must not depend on it."""
        parts = (_Writer(self._walk, self._where, dict(self._seen), self._depth).text(part) for part in values)
        return f"{{{', '.join(sorted(parts))}}}"

    def _function(self, function: types.FunctionType) -> str:
        self._walk._add_function(function)
        home = _home(function)
        closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        cells = [
            (name, _cell(cell)) for name, cell in closure if home != "functools" or name not in _DISPATCH
        ]  # fmt: skip
        bound = self._all((function.__defaults__, function.__kwdefaults__, *cells))
        own = "" if _is_covered(home) else self._items(vars(function).items())
        return f"{home}.{function.__qualname__} {code_digest(function.__code__)} {bound} {own}"

    def _module(self, module: nn.Module) -> str:
        path = self._walk._paths.get(id(module))
        if path is not None:
            return f"at {path!r}"
        tensors = (*module.parameters(), *module.buffers())
        if tensors or any(each._forward_hooks or each._forward_pre_hooks for each in module.modules()):
            raise self._unkeyed("a module that is no submodule, with tensors or hooks")
        return self._items((*attributes(module), *module.named_children()))

    def _object(self, value: Any) -> str:
        """Any other object by what would be copied of it."""
        for name in _COPYING:
            method = getattr(type(value), name, None)
            if isinstance(method, types.FunctionType) and not _is_covered(_home(method)):
                raise self._unkeyed(f"a {type(value).__qualname__} has a {name} of its own")
        try:
            copied = copyreg.dispatch_table.get(type(value), operator.methodcaller("__reduce_ex__", 4))(value)
        except Exception as error:  # whatever an object raises that cannot be copied
            raise self._unkeyed(f"{error}") from error
        if isinstance(copied, str):
            return copied
        make, args, state, parts, items = (*copied, None, None, None)[:5]
        return f"{self._all((make, args, state, *(parts or ())))} {self._items(items or ())}"

    def _unkeyed(self, why: str) -> UnkeyedError:
        return UnkeyedError(f"{self._where}: {why}")


def _named(value: Any) -> str | None:
    """What is known by its name alone, and does nothing or is covered by a version."""
    if isinstance(value, logging.Logger | logging.Handler):
        return str(value.name)
    if isinstance(value, _LOCKS):
        return ""
    if isinstance(value, _SLOTS):
        return f"{value.__objclass__.__module__}.{value.__qualname__}"
    if isinstance(value, _OPERATORS):
        return str(value)
    return None


def tensor_text(x: Tensor, where: str) -> str:
    """A tensor that is no parameter or buffer: its values are constants of the plan. Raises UnkeyedError."""
    if x.device.type != "cpu" or x.numel() > 2**20:
        raise UnkeyedError(f"{where}: a tensor that is no buffer, on {x.device} or with more than 2**20 values")
    data = x.detach().contiguous().flatten().view(torch.uint8) if x.numel() else x
    return f"{tuple(x.shape)} {x.dtype} {hashlib.sha256(data.numpy().tobytes()).hexdigest()}"


def _constant(value: Any) -> str:
    """What a code object may hold; the order of a set is not the same in every process."""
    if isinstance(value, types.CodeType):
        return code_digest(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant, value))})"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(_constant, value)))}}}"
    return f"{type(value).__name__} {value!r}"


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """It and those of the functions defined in it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


@functools.lru_cache(2**14)
def _variables_imports(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Names of globals and of imported modules; an attribute may have the name of a global, and means nothing then."""
    steps = list(dis.get_instructions(code))
    variables = frozenset(step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return variables, frozenset(step.argval for step in steps if step.opname == "IMPORT_NAME")


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _home(function: types.FunctionType) -> str:
    """The module whose globals it uses; a decorator's `__module__` is that of what it wraps."""
    return str(function.__globals__.get("__name__", "no module"))


def _is_covered(module: str) -> bool:
    return not module or module.partition(".")[0] in _COVERED or module.startswith(_OURS)
