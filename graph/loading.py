"""What is computed from weights at load, in an order that lets each weight go right after its last use. Pure."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from horsepower.graph.call import Call, Weight


@dataclass(frozen=True)
class Load:
    """Take some weights, perhaps execute a call; afterwards the values in `frees` are needed no more."""

    takes: tuple[Weight, ...]
    call: Call | None
    frees: tuple[str, ...]


def loading(weights: Sequence[Weight], calls: Sequence[Call], kept: Set[str]) -> tuple[Load, ...]:
    """The steps of a load. `calls` read weights and each other alone; `kept` are the values that runs read.

    A weight is taken when a call first needs it, and the calls that can do with what is there come at once.
    """
    steps = [*_steps({weight.value: weight for weight in weights}, calls)]
    used = {name for _, call in steps if call for name in call.reads}
    steps += [((weight,), None) for weight in weights if weight.value in kept - used]
    last = {name: i for i, (_, call) in enumerate(steps) if call for name in (*call.reads, call.result)}
    frees: list[list[str]] = [[] for _ in steps]
    for name, i in last.items():
        if name not in kept:
            frees[i].append(name)
    return tuple(Load(takes, call, tuple(names)) for (takes, call), names in zip(steps, frees, strict=True))


def _steps(weights: Mapping[str, Weight], calls: Sequence[Call]) -> Iterator[tuple[tuple[Weight, ...], Call | None]]:
    users: dict[str, list[Call]] = {}
    for call in calls:
        for name in call.reads:
            users.setdefault(name, []).append(call)
    there: set[str] = set()
    done: set[str] = set()
    for first in calls:
        needed = dict.fromkeys(name for name in first.reads if name not in there)  # weights: calls come in order
        takes = tuple(weights[name] for name in needed)
        there.update(needed)
        waiting = [first]
        while waiting:
            call = waiting.pop(0)
            if call.result in done or not there.issuperset(call.reads):
                continue
            yield takes, call
            takes = ()
            done.add(call.result)
            there.add(call.result)
            waiting += [user for name in (*call.reads, call.result) for user in users.get(name, ())]


def bytes_held(steps: Sequence[Load]) -> tuple[int, int]:
    """At the most during a load, if no weight lies there before, and after it. What views a value keeps its memory."""
    owners: dict[str, frozenset[str]] = {}
    sizes: dict[str, int] = {}
    alive: set[str] = set()
    peak = 0

    def total() -> int:
        return sum(sizes[owner] for owner in {owner for name in alive for owner in owners[name]})

    for step in steps:
        for weight in step.takes:
            owners[weight.value], sizes[weight.value] = frozenset({weight.value}), weight.spec.bytes
        alive.update(weight.value for weight in step.takes)
        if call := step.call:
            sizes[call.result] = sum(spec.bytes for spec in call.makes)
            viewed = frozenset(owner for name in call.reads for owner in owners[name])
            owners[call.result] = viewed if call.views else frozenset({call.result})
            alive.add(call.result)
        peak = max(peak, total())
        alive.difference_update(step.frees)
    return peak, total()
