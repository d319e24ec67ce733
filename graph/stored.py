"""A plan as JSON text. What is read is data: names of known operators, sizes, constants; nothing is executed."""

import base64
import json
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from horsepower.graph.call import Call, Ref, Weight, refs_in
from horsepower.graph.contract import ConstantRule, Contract, IntegerRule, Rule, TensorRule
from horsepower.graph.graph import Site
from horsepower.graph.operators import operator_of
from horsepower.graph.plan import Plan
from horsepower.graph.sizes import Size, TensorSpec, parse

_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def dump(plan: Plan) -> str:
    """Raises ValueError, naming it, if the plan holds something that JSON cannot."""
    try:
        out_spec = json.loads(pytree.treespec_dumps(plan.out_spec))
    except NotImplementedError as error:
        raise ValueError(f"outputs: {error}") from error
    return json.dumps(
        {
            "rules": [_rule(rule) for rule in plan.contract.rules],
            "conditions": [_size(condition) for condition in plan.contract.conditions],
            "inputs": plan.inputs,
            "weights": [[weight.value, weight.name, _spec(weight.spec)] for weight in plan.weights],
            "constants": {name: _tensor(value) for name, value in plan.constants.items()},
            "loads": [_call(call) for call in plan.loads],
            "calls": [_call(call) for call in plan.calls],
            "outputs": [_value(value) for value in plan.outputs],
            "out_spec": out_spec,
            "sites": [[site.rewrite, site.module, site.refused] for site in plan.sites],
            "traced": plan.traced,
            "target": plan.target,
        },
        indent=0,
    )


def load(text: str, in_spec: pytree.TreeSpec) -> Plan:
    """The inverse of `dump`; `in_spec` is the structure of (args, kwargs).

    Raises ValueError for what is no plan: unknown operators, operators with side effects, values that are read before
    they are made.
    """
    try:
        stored = json.loads(text)
        plan = Plan(
            Contract(
                in_spec,
                tuple(_read_rule(rule) for rule in stored["rules"]),
                tuple(parse(condition) for condition in stored["conditions"]),
            ),
            tuple(stored["inputs"]),
            tuple(Weight(value, name, _read_spec(spec)) for value, name, spec in stored["weights"]),
            {name: _read_tensor(value) for name, value in stored["constants"].items()},
            tuple(_read_call(call) for call in stored["loads"]),
            tuple(_read_call(call) for call in stored["calls"]),
            tuple(_read_value(value) for value in stored["outputs"]),
            pytree.treespec_loads(json.dumps(stored["out_spec"])),
            tuple(Site(*site) for site in stored["sites"]),
            stored["traced"],
            stored["target"],
        )
    except (KeyError, TypeError, AttributeError, NotImplementedError, RuntimeError, AssertionError) as error:
        raise ValueError(f"plan: cannot be read: {error}") from error
    _check(plan)
    return plan


def _check(plan: Plan) -> None:
    known = {weight.value for weight in plan.weights}
    for group, given in ((plan.loads, ()), (plan.calls, plan.inputs)):
        known.update(name for name in given if name)
        for call in group:
            operator_of(call.target)
            if unknown := set(call.reads) - known:
                raise ValueError(f"plan: {call.result} reads {unknown.pop()}, which is not made before")
            known.add(call.result)
    if unknown := set(refs_in(plan.outputs)) - known:
        raise ValueError(f"plan: it returns {unknown.pop()}, which is not made")


def _call(call: Call) -> dict[str, Any]:
    spec = call.spec
    return {
        "result": call.result,
        "target": call.target,
        "args": [_value(arg) for arg in call.args],
        "kwargs": {name: _value(value) for name, value in call.kwargs},
        "spec": [_spec(part) for part in spec] if isinstance(spec, tuple) else spec and _spec(spec),
        "views": call.views,
        "frees": call.frees,
        "module": call.module,
    }


def _read_call(call: dict[str, Any]) -> Call:
    spec = call["spec"]
    return Call(
        call["result"],
        call["target"],
        tuple(_read_value(arg) for arg in call["args"]),
        tuple((name, _read_value(value)) for name, value in call["kwargs"].items()),
        tuple(map(_read_spec, spec)) if isinstance(spec, list) else spec and _read_spec(spec),
        call["views"],
        tuple(call["frees"]),
        call["module"],
    )


def _value(value: Any) -> Any:
    """An argument; what JSON has no word for is a dictionary of one entry."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, list | tuple):
        parts = [_value(part) for part in value]
        return parts if isinstance(value, list) else {"tuple": parts}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for word, kind in _NAMED.items():
        if isinstance(value, kind):
            return {word: str(value).removeprefix("torch.")}
    raise ValueError(f"argument: got {value!r}, which cannot be stored")


def _read_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_read_value(part) for part in value]
    if not isinstance(value, dict):
        return value
    ((word, content),) = value.items()
    if word == "tuple":
        return tuple(_read_value(part) for part in content)
    return {"ref": Ref, "float": float, "device": torch.device}.get(word, lambda name: _named(word, name))(content)


def _named(word: str, name: str) -> Any:
    found = getattr(torch, name, None)
    if word not in _NAMED or not isinstance(found, _NAMED[word]):
        raise ValueError(f"plan: got {word} {name!r}")
    return found


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {
        "shape": [_size(size) for size in spec.shape],
        "strides": [_size(size) for size in spec.strides],
        "dtype": str(spec.dtype).removeprefix("torch."),
        "device": str(spec.device),
    }


def _read_spec(spec: dict[str, Any]) -> TensorSpec:
    shape, strides = (tuple(_read_size(size) for size in spec[key]) for key in ("shape", "strides"))
    return TensorSpec(shape, strides, _named("dtype", spec["dtype"]), torch.device(spec["device"]))


def _size(size: Size) -> int | str:
    if isinstance(size, int):
        return size
    text = str(size)
    if parse(text) != size:
        raise ValueError(f"size: got {text}, which cannot be stored")
    return text


def _read_size(size: int | str) -> Size:
    return size if isinstance(size, int) else parse(size)


def _rule(rule: Rule) -> dict[str, Any]:
    if isinstance(rule, TensorRule):
        return {"tensor": rule.name, "spec": _spec(rule.spec)}
    if isinstance(rule, IntegerRule):
        return {"integer": rule.name, "value": _size(rule.value)}
    return {"constant": rule.name, "value": _value(rule.value)}


def _read_rule(rule: dict[str, Any]) -> Rule:
    if "tensor" in rule:
        return TensorRule(rule["tensor"], _read_spec(rule["spec"]))
    if "integer" in rule:
        return IntegerRule(rule["integer"], _read_size(rule["value"]))
    return ConstantRule(rule["constant"], _read_value(rule["value"]))


def _tensor(x: Tensor) -> dict[str, Any]:
    data = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""
    return {**_spec(TensorSpec.of(x, {})), "data": base64.b64encode(data).decode()}


def _read_tensor(stored: dict[str, Any]) -> Tensor:
    spec, data = _read_spec(stored), base64.b64decode(stored["data"], validate=True)
    x = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return x.view(spec.dtype).reshape(spec.shape).to(spec.device)
