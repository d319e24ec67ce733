"""Equal blocks of a model, found before tracing: each kind is traced once and stamped out for the others."""

from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device)


def find(root: nn.Module) -> dict[str, Hashable]:
    """Path of each block that equals another one -> its kind. Blocks are the elements of a ModuleList or Sequential.

    Two blocks are equal if their classes, plain attributes and the shapes, strides and dtypes of their tensors are. A
    block with hooks, or that shares a tensor with another place, is left to be traced where it stands.
    """
    owners = Counter(id(x) for x in _tensors(root))
    kinds = {
        path: kind
        for path, block in _elements(root)
        if all(owners[id(x)] == 1 for x in _tensors(block)) and (kind := signature(block)) is not None
    }
    count = Counter(kinds.values())
    repeated = {path: kind for path, kind in kinds.items() if count[kind] > 1}
    return {path: kind for path, kind in repeated.items() if not any(path.startswith(f"{up}.") for up in repeated)}


def signature(module: nn.Module) -> Hashable | None:
    """What two modules must have in common to compute the same function of their tensors; None if it cannot be said."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return None
    children = []
    for name, child in module.named_children():
        own = signature(child)
        if own is None:
            return None
        children.append((name, own))
    tensors = (*module._parameters.items(), *module._buffers.items())
    shapes = [(name, None if x is None else (x.shape, x.stride(), x.dtype, x.device)) for name, x in tensors]
    texts = tuple((name, text(value)) for name, value in attributes(module))
    return type(module), tuple(children), tuple(shapes), texts


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a user set on a module, in the order of the names, training mode included."""
    internal = nn.Module().__dict__
    return ((name, value) for name, value in sorted(vars(module).items()) if name not in internal or name == "training")


def text(value: Any) -> str:
    """A value of an attribute as text that can be compared; objects are told apart by their identity."""
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} [{', '.join(map(text, value))}]"
    if isinstance(value, dict):
        return f"dict [{', '.join(f'{text(k)}: {text(v)}' for k, v in value.items())}]"
    return f"{type(value).__qualname__} at {id(value)}"


def _elements(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in root.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for name, child in module.named_children():
                yield f"{path}.{name}" if path else name, child


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer, as often as it has names."""
    yield from (x for _, x in module.named_parameters(remove_duplicate=False))
    yield from (x for _, x in module.named_buffers(remove_duplicate=False))
