"""The key of a plan: what computes another function has another one, what computes the same has the same."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from values import VALUES, Descriptor, Mode, double, scaled, successor, weighted

from foreign import example
from horsepower.graph import key as compiler_key
from horsepower.graph import passes
from horsepower.graph.code import UnkeyedError
from horsepower.graph.key import key_of
from horsepower.kernels import tables
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.presets import FOAL

VALUE = None
X = torch.ones(3)


def key(module):
    return key_of(module, (X,), {}, None, "forward", passes.PASSES)


def as_global(value, patch):
    class Uses(nn.Module):
        def forward(self, x):
            return x * VALUE.inner.value

    patch.setitem(globals(), "VALUE", value)
    return Uses()


def as_class_attribute(value, patch):
    class Uses(nn.Module):
        inner = value

        def forward(self, x):
            return x * self.inner.value

    return Uses()


def as_attribute(value, patch):
    class Uses(nn.Module):
        def forward(self, x):
            return x * self.held[0].inner.value

    module = Uses()
    module.held = [value]
    return module


def as_default(value, patch):
    class Uses(nn.Module):
        def forward(self, x, scale=value):
            return x * scale.inner.value

    return Uses()


def as_closure(value, patch):
    class Uses(nn.Module):
        def forward(self, x):
            return x * value.inner.value

    return Uses()


def in_a_global_dict(value, patch):
    return as_global({"a": value}, patch)


PLACES = (as_global, as_class_attribute, as_attribute, as_default, as_closure, in_a_global_dict)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("name", VALUES)
def test_another_value_is_another_key(monkeypatch, name, place):
    first, twin, other = (key(place(VALUES[name](i), monkeypatch)) for i in (0, 0, 1))
    assert first == twin != other


class Identity(nn.Module):
    def forward(self, x):
        return x


def with_own_forward(i, submodule=False):
    module = nn.Sequential(Identity()) if submodule else Identity()
    at = module[0] if submodule else module
    at.forward = types.MethodType((lambda self, x: x * 2, lambda self, x: x * 3)[i], at)
    return module


def with_member(member):
    class Uses(nn.Module):
        def forward(self, x):
            return self.inner(x)

    Uses.inner = member
    return Uses()


def with_cached(i):
    class Uses(nn.Module):
        @functools.cached_property
        def scale(self):
            return i

        def forward(self, x):
            return x * self.scale

    return Uses()


def with_base(i):
    class Derived((nn.SiLU, nn.Tanh)[i]):
        pass

    return Derived()


def with_a_named_attribute(i):
    class Uses(nn.Module):
        scale_a = i

        def forward(self, x):
            return x * getattr(self, "scale_a")  # noqa: B009

    return Uses()


def with_a_configured_method(i):
    class Uses(nn.Module):
        def plus(self, x):
            return x + i

        def forward(self, x):
            return getattr(self, self.kind)(x)

    module = Uses()
    module.kind = "plus"
    return module


def with_an_absent_child(i):
    module = Identity()
    if i:
        module.register_module("norm", None)
    return module


def with_handled_errors(i):
    class Wide(nn.Module):
        def forward(self, x):
            try:
                return x.narrow(0, 0, 9)
            except RuntimeError:
                return x * 2

    class Narrow(nn.Module):
        def forward(self, x):
            return x.narrow(0, 0, 9)

    return (Wide, Narrow)[i]()


def with_a_parameter(**values):
    module = Identity()
    module.weight = nn.Parameter(torch.ones(3))
    for name, value in values.items():
        setattr(module.weight, name, value)
    return module


def with_a_buffer(i):
    module = Identity()
    module.register_buffer("table", X, persistent=bool(i))
    return module


def with_a_made_class(i):
    return with_member(dataclasses.make_dataclass("Made", ["x"], namespace={"__call__": scaled(i)})(1))


def with_globals(i):
    code = "def f(x):\n    return x * globals()['held']"
    sys.modules["made_for_test"] = home = types.ModuleType("made_for_test")
    home.held = i
    exec(code, vars(home))
    return with_member(home.f)


def with_a_late_import(i, code="from made_for_test import held"):
    sys.modules["made_for_test"] = home = types.ModuleType("made_for_test")
    home.held = i
    space = {"__name__": "another", "sys": sys}
    exec(f"def f(x):\n    {code}\n    return x * held", space)
    return with_member(space["f"])


MODULES = {
    "gradient": lambda i: with_a_parameter(requires_grad=bool(i)),
    "attribute of a parameter": lambda i: with_a_parameter(scale=i),
    "buffer that is saved": with_a_buffer,
    "made class": with_a_made_class,
    "global by name": with_globals,
    "late import": with_a_late_import,
    "table of modules": functools.partial(with_a_late_import, code="held = sys.modules['made_for_test'].held"),
    "forward of a module": with_own_forward,
    "forward of a submodule": functools.partial(with_own_forward, submodule=True),
    "static method": lambda i: with_member(staticmethod((torch.sin, torch.cos)[i])),
    "class method": lambda i: with_member(classmethod(scaled(i))),
    "property": lambda i: with_member(property(scaled(i))),
    "partial method": lambda i: with_member(functools.partialmethod(weighted, a=i, b=1 - i)),
    "descriptor": lambda i: with_member(Descriptor(i)),
    "cached property": with_cached,
    "base class": with_base,
    "attribute by a constant name": with_a_named_attribute,
    "method by a configured name": with_a_configured_method,
    "absent child": with_an_absent_child,
    "handled errors": with_handled_errors,
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_another_module_is_another_key(monkeypatch, make):
    monkeypatch.setitem(sys.modules, "made_for_test", None)  # what a maker leaves there goes
    assert key(make(0)) == key(make(0)) != key(make(1))


def test_a_global_of_the_same_name_as_an_attribute_is_not_read(monkeypatch):
    class Uses(nn.Module):
        def forward(self, x):
            return self.VALUE * x

    module = Uses()
    module.VALUE = 2
    keys = []
    for value in (1, 2):
        monkeypatch.setitem(globals(), "VALUE", value)
        keys.append(key(module))
    assert keys[0] == keys[1]


def test_the_environment_counts_where_it_is_read(monkeypatch):
    class Reads(nn.Module):
        def forward(self, x):
            return x * float(os.environ["SCALE_OF_TEST"])

    class Computes(nn.Module):
        def forward(self, x):
            return x * float(os.getenv(self.name))

    keys = []
    for value in ("2", "2", "3"):
        monkeypatch.setenv("SCALE_OF_TEST", value)
        keys.append(key(Reads()))
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(UnkeyedError, match=r"Computes.forward: it reads the environment"):
        key(Computes())


class Copied:
    def __reduce__(self):
        return Copied, ()


def nested(depth):
    return [nested(depth - 1)] if depth else 1


def two_classes():
    def made(i):
        class Same:
            scale = i

        return Same

    return [made(1), made(2)]


UNKEYED = {
    "view of memory": (lambda: memoryview(b""), "cannot pickle"),
    "own way to copy": (Copied, "a Copied has a __reduce__ of its own"),
    "module with weights": (lambda: nn.Linear(2, 2), "a module that is no submodule, with tensors or hooks"),
    "two classes": (two_classes, "two classes of this name"),
    "depth": (lambda: nested(100), "it is nested too deeply"),
    "tensor of a device": (lambda: torch.empty(2, device="meta"), "a tensor that is no buffer, on meta"),
}


@pytest.mark.parametrize(("make", "message"), UNKEYED.values(), ids=UNKEYED)
def test_what_cannot_be_told_apart_has_no_key(monkeypatch, make, message):
    for place in PLACES:
        with pytest.raises(UnkeyedError, match=re.escape(message)):
            key(place(make(), monkeypatch))


def test_what_was_measured_of_the_kernels_is_in_the_key(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    keys = []
    for text in ("", "{}", "[]"):
        if text:
            (tmp_path / "linear.sm_90.json").write_text(text)
        compiler_key._own_sources.cache_clear()
        keys.append(key(Identity()))
    assert len(set(keys)) == 3
    compiler_key._own_sources.cache_clear()


def model_keys():
    """Of models that are compiled; and of values in sets, which have another order in every process."""
    module = Identity()
    module.held = {*Mode, double, successor, ("a", 1), "b", None, frozenset({Mode.A, "c"})}
    yield key(module)
    yield key_of(DiT(FOAL, device="meta"), (), {}, None, "velocity", passes.PASSES)
    for name in ("llama", "wan", "ltx", "vit"):
        module, args, kwargs = example(name, tokens=48)
        yield key_of(module, args, kwargs, None, "forward", passes.PASSES)


def test_another_process_finds_the_same_keys():
    code = "import test_key; print(*test_key.model_keys())"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 6
