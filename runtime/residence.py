"""The parts of an engine and where each lies: on its device, on the host, or nowhere but in its files."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from horsepower.runtime.turns import Part, Turn


class Movable(Protocol):
    """What lies on one device and can be brought to another."""

    def to(self, device: torch.device, /) -> Any: ...


class Arenas(Movable, Protocol):
    """What has scratch memory beside it."""

    @property
    def arena_bytes(self) -> int: ...

    def drop_arenas(self) -> None: ...


HOST = torch.device("cpu")


class Residence:
    """Brings parts to a device when a turn says so, and lets others go; counts what lies where."""

    def __init__(self, device: torch.device, load: Callable[[str], Movable]):
        """load: makes a part on the device."""
        self._device, self._load = device, load
        self._there: dict[str, Movable] = {}
        self._waiting: dict[str, Movable] = {}
        self.parts: dict[str, Part] = {}  # all that lie on the device or wait on the host

    def __getitem__(self, name: str) -> Any:
        """A part that lies on the device."""
        return self._there[name]

    @property
    def there(self) -> tuple[str, ...]:
        """The names of those on the device, their arenas with them."""
        return tuple(name for name in self.parts if name not in self._waiting)

    @property
    def waiting(self) -> frozenset[str]:
        """The names of those on the host."""
        return frozenset(self._waiting)

    @property
    def bytes(self) -> int:
        """Of the device; arenas as large as they are by now, not as they will be."""
        weights = sum(self.parts[name].bytes for name in self.there if self.parts[name].arena_of is None)
        return weights + sum(
            self._owner(self.parts[name]).arena_bytes for name in self.there if name not in self._there
        )

    def _owner(self, arena: Part) -> Arenas:
        assert arena.arena_of is not None
        owner: Arenas = self._there[arena.arena_of]  # type: ignore[assignment]
        return owner

    @property
    def host_bytes(self) -> int:
        return sum(self.parts[name].bytes for name in self.waiting)

    def follow(self, turn: Turn, parts: Mapping[str, Part]) -> None:
        """Let those go that leave, to the host where the turn says so; bring those that come."""
        for name in turn.leaves:
            self._leave(name, name in turn.host)
        if turn.leaves and self._device.type == "cuda":
            torch.cuda.empty_cache()  # pieces of the size of other tensors are of no use for these
        for name in turn.comes:
            self._come(name, parts[name])
        self.parts.update({name: parts[name] for name in turn.device if name in self.parts})  # arenas may have grown

    def forget(self, owner: str) -> None:
        """Let a part go for good with its arena, if it is there at all; it is loaded anew when it is next needed."""
        for name in [name for name, part in self.parts.items() if owner in (name, part.arena_of)]:
            del self.parts[name]
        self._there.pop(owner, None)
        self._waiting.pop(owner, None)

    def _leave(self, name: str, to_host: bool) -> None:
        part = self.parts.pop(name)
        if part.arena_of is not None:
            self._owner(part).drop_arenas()
            return
        held = self._there.pop(name)
        if to_host:
            held.to(HOST)
            self._waiting[name], self.parts[name] = held, part

    def _come(self, name: str, part: Part) -> None:
        if part.arena_of is None:
            self.parts.pop(name, None)
            held = self._waiting.pop(name, None)
            if held is None:
                held = self._load(name)
            else:
                held.to(self._device)
            self._there[name] = held
        self.parts[name] = part
