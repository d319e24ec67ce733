"""Pairs of values that differ in one thing and make a model another function: `VALUES[name](0)` and `(1)`."""

import collections
import dataclasses
import enum
import fractions
import functools
import operator
import re
import types

import numpy as np
import torch
from torch import nn


def double(x):
    return x * 2


def successor(x):
    return x + 1


def scaled(factor):
    return lambda x: x * factor


def by_default(factor):
    def scale(x, factor=factor):
        return x * factor

    return scale


def weighted(x, a, b):
    return x * a + b


@dataclasses.dataclass
class Config:
    scale: float


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale


class Scaler:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor

    def scale(self, x):
        return x * self.factor


class Descriptor(Scaler):
    def __get__(self, instance, owner):
        return self.factor


class Mode(enum.Enum):
    A = 1
    B = 2


Pair = collections.namedtuple("Pair", "a b")


def wrapping(factor):
    return functools.update_wrapper(Scaler(factor), double)


def dispatched(function):
    single = functools.singledispatch(successor)
    single.register(torch.Tensor, function)
    return single


def cyclic(value):
    parts = [value]
    parts.append(parts)
    return parts


def module_of(value):
    inner, outer = types.ModuleType("outer.inner"), types.ModuleType("outer")
    inner.value, outer.inner = value, inner
    return outer


def recursive(factor):
    def power(x, n):
        return x if n == 0 else power(x * factor, n - 1)

    return power


VALUES = {
    "builtin": lambda i: (torch.sin, torch.cos)[i],
    "operator": lambda i: (torch.ops.aten.sin.default, torch.ops.aten.cos.default)[i],
    "operators of a name": lambda i: (torch.ops.aten.sin, torch.ops.aten.cos)[i],
    "torch function": lambda i: (nn.functional.softsign, nn.functional.tanhshrink)[i],
    "method of a class": lambda i: (torch.Tensor.sin, torch.Tensor.cos)[i],
    "itemgetter": operator.itemgetter,
    "attrgetter": lambda i: operator.attrgetter("ab"[i]),
    "number": float,
    "text": str,
    "dataclass": Config,
    "slots": Slotted,
    "namespace": lambda i: types.SimpleNamespace(scale=i),
    "enum member": lambda i: (Mode.A, Mode.B)[i],
    "enum value": lambda i: enum.Enum("Level", {"HIGH": i}),
    "numpy scalar": np.float32,
    "numpy array": lambda i: np.array([i]),
    "tensor": lambda i: torch.tensor([i]),
    "fraction": lambda i: fractions.Fraction(1, i + 2),
    "pattern": lambda i: re.compile("ab"[i]),
    "slice": slice,
    "range": range,
    "ordered dict": lambda i: collections.OrderedDict(scale=i),
    "ordered dict of functions": lambda i: collections.OrderedDict(act=scaled(i)),
    "default dict": lambda i: collections.defaultdict((int, float)[i]),
    "mapping proxy": lambda i: types.MappingProxyType({"scale": i}),
    "order of functions": lambda i: [double, successor][:: 1 - 2 * i],
    "order of keys": lambda i: dict([("a", 1), ("b", 2)][:: 1 - 2 * i]),
    "named tuple": lambda i: Pair(i, 1 - i),
    "partial": lambda i: functools.partial(weighted, a=i, b=1 - i),
    "partial of a builtin": lambda i: functools.partial((torch.sin, torch.cos)[i]),
    "closure": scaled,
    "order of closures": lambda i: (scaled(i), scaled(1 - i)),
    "default": by_default,
    "order of defaults": lambda i: [by_default(i), by_default(1 - i)],
    "recursion": recursive,
    "bound method": lambda i: Scaler(i).scale,
    "method of a dict": lambda i: {"scale": i}.get,
    "callable": Scaler,
    "wrapper": wrapping,
    "object of a builtin": lambda i: Scaler((torch.sin, torch.cos)[i]),
    "object of a closure": lambda i: Scaler(scaled(i)),
    "cached": lambda i: functools.lru_cache(scaled(i)),
    "single dispatch": lambda i: dispatched((double, successor)[i]),
    "module": lambda i: (nn.SiLU, nn.Tanh)[i](),
    "module of another configuration": lambda i: nn.LeakyReLU(i),
    "set of functions": lambda i: {double, (successor, scaled)[i]},
    "cycle": cyclic,
    "python module": lambda i: (fractions, functools)[i],
    "value in a module in a module": module_of,
    "function in a module in a module": lambda i: module_of(scaled(i)),
}
