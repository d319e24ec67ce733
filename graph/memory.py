"""Where results lie: lifetimes, and places in one arena for those that are alive at one time. Pure functions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch

from horsepower.graph.call import Call, Ref, refs_in
from horsepower.graph.operators import writer_of
from horsepower.graph.sizes import Size, Sizes, TensorSpec, evaluate
from horsepower.kernels.registry import op_of

Result: TypeAlias = tuple[int, int]  # a call's position, and which of its results

TRIALS = 16  # of packing
ALIGNMENT = 64  # bytes: a cache line, and what the widest loads ask for


@dataclass(frozen=True)
class Place:
    """Where in the arena a tensor lies."""

    offset: int  # bytes
    spec: TensorSpec


@dataclass(frozen=True)
class Layout:
    """The memory of one run at given sizes, in bytes.

    What an op's reference, or an operator of torch, needs for the time of a call is not in it.
    """

    results: Mapping[Result, Place]  # what is not here its operator allocates
    workspaces: Mapping[int, tuple[int, int]]  # call -> offset and bytes of its scratch memory
    device: torch.device
    arena: int
    peak: int  # the arena, and the most that operators have allocated beside it at one time


def lay_out(
    calls: Sequence[Call], outputs: Sequence[Any], specs: Mapping[str, TensorSpec], sizes: Sizes,
    device: torch.device, target: str,
) -> Layout:  # fmt: skip
    """Places on a device for all results and scratch memory; `specs` are those of all values that are one tensor."""
    value = cache(lambda size: evaluate(size, sizes))
    devices = {"cpu" if target == "cpu" else "cuda", device.type}  # a GPU's plan may be tried on a CPU
    made = {(i, k): spec.at(value) for i, call in enumerate(calls) for k, spec in enumerate(call.makes)}
    lives = lifetimes(calls, outputs)
    placed = [(i, k) for i, call in enumerate(calls) if _is_placed(call, device) for k in range(len(call.makes))]
    others = [Block(made[each].bytes, *lives[each]) for each in made.keys() - placed]
    scratch = [(i, size) for i, call in enumerate(calls) if (size := _workspace(call, specs, value, devices))]
    blocks = [Block(made[each].bytes, *lives[each]) for each in placed]
    offsets, arena = pack([*blocks, *(Block(size, i, i) for i, size in scratch)])
    results = {each: Place(offset, made[each]) for each, offset in zip(placed, offsets, strict=False)}
    behind = offsets[len(placed) :]
    workspaces = {i: (offset, size) for (i, size), offset in zip(scratch, behind, strict=True)}
    return Layout(results, workspaces, device, arena, arena + lower_bound(others))


def lifetimes(calls: Sequence[Call], outputs: Sequence[Any]) -> dict[Result, tuple[int, int]]:
    """The first and the last call that need each result; to view it is no need. Outputs live past the last call."""
    owners: dict[str, tuple[frozenset[Result], ...]] = {}  # whose memory a value is, part by part
    last: dict[Result, int] = {}
    for i, call in enumerate(calls):
        read = [owners[name] for name in call.reads if name in owners]
        if not call.views:
            last.update((each, i) for parts in read for part in parts for each in part)
            last.update(((i, k), i) for k in range(len(call.makes)))
            owners[call.result] = tuple(frozenset({(i, k)}) for k in range(len(call.makes)))
        elif call.target == "_operator.getitem" and read and len(read[0]) > 1:
            owners[call.result] = (read[0][call.args[1]],)
        else:
            owners[call.result] = (frozenset(each for parts in read for part in parts for each in part),)
    for name in refs_in(outputs):
        last.update((each, len(calls)) for part in owners.get(name, ()) for each in part)
    return {each: (each[0], end) for each, end in last.items()}


def _is_placed(call: Call, device: torch.device) -> bool:
    """Whether its results are written into the arena: its operator must know how."""
    return all(spec.device == device for spec in call.makes) and writer_of(call.target) is not None


def _workspace(call: Call, specs: Mapping[str, TensorSpec], value: Callable[[Size], int], devices: set[str]) -> int:
    op = op_of(call.target)
    if op is None or all(kernel.workspace is None for kernel in op.kernels):
        return 0

    def argument(value_or_ref: Any) -> Any:  # integers stay unknown: they decide nothing here
        spec = specs.get(value_or_ref.name) if isinstance(value_or_ref, Ref) else None
        return spec.at(value).meta() if spec else value_or_ref

    return op.workspace(devices, *map(argument, call.args))


@dataclass(frozen=True)
class Block:
    """Memory that is taken by step `first` and needed until step `last`, that one included."""

    bytes: int
    first: int
    last: int


def pack(blocks: Sequence[Block]) -> tuple[tuple[int, ...], int]:
    """An offset for each block, so that no two overlap in space and time, and the bytes of the arena.

    One after another, each at the lowest place that is free all its life. What is alive when most is alive comes
    first: it stacks without a gap, the longest-lived at the bottom. As long as that wastes memory, the blocks that
    ended at the top come first in the next of some trials.
    """
    step, least = _fullest(blocks)

    def rank(i: int) -> tuple[int, ...]:
        block = blocks[i]
        alive = block.first <= step <= block.last
        return (0, block.first - block.last, -block.bytes) if alive else (1, -block.bytes, block.first)

    order = sorted((i for i, block in enumerate(blocks) if block.bytes), key=rank)
    best: tuple[tuple[int, ...], int] | None = None
    for _ in range(TRIALS):
        offsets, end = _pack(blocks, order)
        if best is None or end < best[1]:
            best = offsets, end
        if end == least:
            break
        top = {i for i in order if offsets[i] + aligned(blocks[i].bytes) == end}
        order = [*(i for i in order if i in top), *(i for i in order if i not in top)]
    assert best is not None
    return best


def _pack(blocks: Sequence[Block], order: Sequence[int]) -> tuple[tuple[int, ...], int]:
    taken: dict[int, list[tuple[int, int]]] = {}  # step -> ranges of the arena
    offsets = [0] * len(blocks)
    end = 0
    for i in order:
        size, life = aligned(blocks[i].bytes), range(blocks[i].first, blocks[i].last + 1)
        offset = 0
        for start, stop in sorted({each for step in life for each in taken.get(step, ())}):
            if start - offset >= size:
                break
            offset = max(offset, stop)
        for step in life:
            taken.setdefault(step, []).append((offset, offset + size))
        offsets[i] = offset
        end = max(end, offset + size)
    return tuple(offsets), end


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def lower_bound(blocks: Sequence[Block]) -> int:
    """The most bytes that are alive at one step: no arena can be smaller."""
    return _fullest(blocks)[1]


def _fullest(blocks: Sequence[Block]) -> tuple[int, int]:
    """The step at which most bytes are alive, and how many."""
    change: dict[int, int] = {}
    for block in blocks:
        change[block.first] = change.get(block.first, 0) + aligned(block.bytes)
        change[block.last + 1] = change.get(block.last + 1, 0) - aligned(block.bytes)
    alive = peak = at = 0
    for step in sorted(change):
        alive += change[step]
        if alive > peak:
            peak, at = alive, step
    return at, peak
