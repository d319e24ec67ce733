"""What lies on an engine's device in each phase of a request, decided before anything is allocated. Pure.

With memory enough every part stays. Otherwise some take turns: such a part comes for the phases that need it and gives
way before the next one that does not, to the host, or, where that has no room, for good: it is read again. Which ones
do so is the choice that moves the fewest bytes.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import combinations

GB = 10**9


@dataclass(frozen=True)
class Part:
    """What stays on the device from when it is first needed until it gives way."""

    bytes: int
    load: int = 0  # the most at one time while it is loaded, if that is more
    host_load: int = 0  # bytes of the host while it is loaded
    arena_of: str | None = None  # the part whose scratch memory it is: dropped, not moved, and before that part goes


@dataclass(frozen=True)
class Phase:
    """A stage of a request: what it needs, and what it takes beside that while it runs."""

    name: str
    needs: tuple[str, ...]
    activations: Mapping[str, int] = field(default_factory=dict)  # by part; they come one after the other

    @property
    def beside(self) -> int:
        return max(self.activations.values(), default=0)


@dataclass(frozen=True)
class Turn:
    """Where parts lie while a phase runs, in bytes; what moves before it."""

    phase: str
    device: Mapping[str, int]
    activations: Mapping[str, int]
    loading: int  # beside the parts, while the last of them is loaded
    host: Mapping[str, int]
    leaves: tuple[str, ...]  # in this order
    comes: tuple[str, ...]

    @property
    def peak(self) -> int:
        return sum(self.device.values()) + max(self.loading, *self.activations.values(), 0)


@dataclass(frozen=True)
class MemoryStatement:
    """What a request takes, phase by phase; `print` it."""

    turns: tuple[Turn, ...]
    budget: int  # bytes of the device that are the engine's
    least: int  # bytes without which not even turns would do
    alternating: tuple[str, ...]  # parts that do not stay

    @property
    def fullest(self) -> Turn:
        return max(self.turns, key=lambda turn: turn.peak)

    @property
    def peak(self) -> int:
        """Bytes of the device, over all phases."""
        return self.fullest.peak

    @property
    def host_peak(self) -> int:
        """Bytes of the host that parts wait in."""
        return max(sum(turn.host.values()) for turn in self.turns)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user of a clip should know of it."""
        if not self.alternating:
            return ()
        where = "on the host" if any(turn.host for turn in self.turns) else "in their files"
        return (f"memory: {', '.join(self.alternating)} take turns within {_gb(self.budget)}, waiting {where}",)

    def text(self) -> str:
        """One line a phase, in GB (10^9 bytes)."""
        waits = f"; {_gb(self.host_peak)} on the host" if self.host_peak else ""
        lines = [f"memory: peak {_gb(self.peak)} of {_gb(self.budget)}, in {self.fullest.phase}{waits}"]
        width = max(len(turn.phase) for turn in self.turns)
        for turn in self.turns:
            parts = " + ".join(f"{name} {_gb(size)}" for name, size in turn.device.items())
            beside = max((*turn.activations.values(), turn.loading), default=0)
            host = ", ".join(f"{name} {_gb(size)}" for name, size in turn.host.items())
            waits = f"; on the host: {host}" if host else ""
            lines.append(f"  {turn.phase:<{width}}  {_gb(turn.peak)} = {parts} + activations {_gb(beside)}{waits}")
        return "\n".join((*lines, *self.notes))

    def __str__(self) -> str:
        return self.text()


def _gb(size: int) -> str:
    """In the largest of GB (10^9 bytes), MB, kB and B of which there is a tenth."""
    unit, name = next(((n, name) for n, name in ((GB, "GB"), (10**6, "MB"), (1000, "kB")) if 10 * size >= n), (1, "B"))
    return f"{size / unit:.1f} {name}"


def least(parts: Mapping[str, Part], phases: Sequence[Phase]) -> tuple[int, Phase]:
    """The bytes without which not even turns help, and the phase that takes them."""
    return max(((_peak(parts, phase, set(phase.needs)), phase) for phase in phases), key=lambda each: each[0])


def state(
    parts: Mapping[str, Part],
    phases: Sequence[Phase],
    budget: int | None,
    host: int,
    there: Sequence[str] = (),
    waiting: Set[str] = frozenset(),
) -> MemoryStatement:
    """Who stays and who takes turns within `budget` bytes of the device, and `host` bytes for those that wait.

    budget: None takes the least that will do. there, waiting: parts that lie on the device and on the host already.
    Raises ValueError if not even turns fit.
    """
    needed = least(parts, phases)[0]
    room = needed if budget is None else budget
    if needed > room:
        raise ValueError(f"device_memory: got {room} bytes, allowed: at least {needed}; {needed - room} are missing")
    kept = _kept(parts, phases, room)
    homes = _homes(parts, set(parts) - kept, host, waiting)
    lying, turns = list(there), []
    outside = set(waiting)
    for phase in phases:
        leaves = sorted(set(lying) - kept - set(phase.needs), key=lambda name: parts[name].arena_of is None)
        comes = [name for name in phase.needs if name not in lying]
        loading = max((_loading(parts[name]) for name in comes if name not in outside), default=0)
        lying = [name for name in lying if name not in leaves] + comes
        outside = (outside | (set(leaves) & homes)) - set(lying)
        device = {name: parts[name].bytes for name in lying}
        resting = {name: parts[name].bytes for name in parts if name in outside}
        turns.append(Turn(phase.name, device, phase.activations, loading, resting, tuple(leaves), tuple(comes)))
    alternating = tuple(name for name, part in parts.items() if name not in kept and part.arena_of is None)
    return MemoryStatement(tuple(turns), room, needed, alternating)


def _loading(part: Part) -> int:
    return max(0, part.load - part.bytes)


def _peak(parts: Mapping[str, Part], phase: Phase, lying: Set[str]) -> int:
    loading = max((_loading(parts[name]) for name in phase.needs), default=0)
    return sum(parts[name].bytes for name in lying) + max(phase.beside, loading)


def _kept(parts: Mapping[str, Part], phases: Sequence[Phase], budget: int) -> set[str]:
    """The parts that stay in all phases: of the sets that fit, the one that leaves the fewest bytes to move."""
    best: tuple[tuple[int, int], set[str]] | None = None
    for count in range(len(parts) + 1):
        for gone in map(set, combinations(parts, count)):
            cost = (
                sum(parts[name].bytes for name in gone if parts[name].arena_of is None),
                sum(parts[name].bytes for name in gone if parts[name].arena_of is not None),
            )
            kept = set(parts) - gone
            if (best is not None and cost >= best[0]) or any(parts[name].arena_of in gone for name in kept):
                continue
            if all(_peak(parts, phase, kept | set(phase.needs)) <= budget for phase in phases):
                best = cost, kept
    assert best is not None, "what fits phase by phase fits with nothing kept"
    return best[1]


def _homes(parts: Mapping[str, Part], gone: Set[str], host: int, waiting: Set[str]) -> set[str]:
    """Those that wait on the host: as many as it has room for, so that the others can still be loaded.

    After those that are there come what takes the host's memory to be loaded, and the largest.
    """

    def needed(homes: Set[str]) -> int:
        loads = (part.host_load for name, part in parts.items() if name not in homes)
        return sum(parts[name].bytes for name in homes) + max(loads, default=0)

    homes: set[str] = set(waiting)
    for name in sorted(gone - waiting, key=lambda name: (-parts[name].host_load, -parts[name].bytes, name)):
        if parts[name].arena_of is None and needed(homes | {name}) <= host:
            homes.add(name)
    return homes
