"""Who stays on the device and who takes turns: pure, from sizes."""

from itertools import combinations

import pytest

from horsepower.runtime.turns import Part, Phase, least, state

# In the proportions of the released models, in GB
PARTS = {
    "text": Part(18),
    "base": Part(30, load=31),
    "base arena": Part(1, arena_of="base"),
    "sr": Part(30),
    "sr arena": Part(5, arena_of="sr"),
    "video": Part(1),
    "audio": Part(1),
}
PHASES = (
    Phase("text", ("text",), {"text": 3}),
    Phase("base", ("base", "base arena"), {"base": 1}),
    Phase("super-resolution", ("sr", "sr arena"), {"sr": 1}),
    Phase("video", ("video",), {"video": 27}),
    Phase("audio", ("audio",), {"audio": 1}),
)


def test_with_memory_enough_everything_stays():
    statement = state(PARTS, PHASES, 200, 0)
    assert statement.alternating == statement.notes == ()
    assert [turn.leaves for turn in statement.turns] == [()] * 5
    assert [name for turn in statement.turns for name in turn.comes] == list(PARTS)
    assert statement.turns[-1].device == {name: part.bytes for name, part in PARTS.items()}
    assert statement.peak == sum(part.bytes for part in PARTS.values()) - 1 + 27  # before the audio codec is there
    assert statement.fullest.phase == "video"


def test_in_40_the_models_take_turns():
    statement = state(PARTS, PHASES, 40, 1000)
    assert statement.alternating == ("text", "base", "sr")
    assert [sorted(turn.device) for turn in statement.turns] == [
        ["text"],
        ["base", "base arena"],
        ["sr", "sr arena"],
        ["video"],
        ["audio", "video"],
    ]
    assert [turn.peak for turn in statement.turns] == [21, 32, 36, 28, 3]
    assert [sum(turn.host.values()) for turn in statement.turns] == [0, 18, 48, 78, 78]
    assert statement.notes == ("memory: text, base, sr take turns within 40.0 B, waiting on the host",)
    again = state(PARTS, PHASES, 40, 1000, ("audio", "video"), frozenset(("text", "base", "sr")))
    assert again.turns[0].comes == ("text",)
    assert sum(again.turns[0].host.values()) == 60


def test_the_fewest_bytes_move():
    """At 85 an idle model has to go, and the text encoder may stay; at 108 scratch memory alone."""
    assert state(PARTS, PHASES, 85, 1000).alternating == ("base",)
    statement = state(PARTS, PHASES, 108, 1000)
    assert statement.alternating == ()
    assert {name for turn in statement.turns for name in turn.leaves} == {"sr arena"}


def test_where_the_host_has_no_room_parts_are_read_again():
    statement = state(PARTS, PHASES, 40, 0)
    assert statement.host_peak == 0
    assert statement.notes[0].endswith("waiting in their files")
    some = state(PARTS, PHASES, 40, 50)
    assert some.host_peak == 48  # one model, and the text encoder
    assert [turn.peak for turn in some.turns] == [turn.peak for turn in statement.turns]


def test_the_host_keeps_room_for_what_is_loaded_there():
    """The text encoder is made on the host: it waits there first, or leaves room for itself."""
    parts = {**PARTS, "text": Part(18, host_load=18)}
    assert state(parts, PHASES, 40, 47).turns[3].host == {"text": 18}
    assert state(parts, PHASES, 40, 48).turns[3].host == {"text": 18, "base": 30}
    kept = {**PARTS, "text": Part(1, host_load=20)}
    assert state(kept, PHASES, 66, 49).turns[3].host == {}
    assert state(kept, PHASES, 66, 50).turns[3].host == {"base": 30}


def test_a_load_that_takes_more_than_what_it_leaves():
    phase = Phase("base", ("base",), {"base": 0})
    turn, again = (state(PARTS, (phase,), None, 0, there).turns[0] for there in ((), ("base",)))
    assert (turn.peak, turn.loading) == (31, 1)
    assert (again.peak, again.loading, again.comes) == (30, 0, ())
    waiting = state({"base": PARTS["base"]}, (phase,), None, 99, (), frozenset(("base",))).turns[0]
    assert (waiting.peak, waiting.comes) == (30, ("base",))


def test_what_earlier_requests_left_goes_when_there_is_no_room():
    left = {**PARTS, "540p_sr": Part(30), "540p_sr arena": Part(2, arena_of="540p_sr")}
    there = ("540p_sr", "540p_sr arena", "video")
    turns = state(left, PHASES, 60, 1000, there).turns
    assert turns[0].leaves == ("540p_sr arena", "540p_sr")  # scratch memory first
    assert turns[0].host == {"540p_sr": 30}
    assert "540p_sr" in state(left, PHASES, 200, 0, there).turns[-1].device


@pytest.mark.parametrize("budget", [None, 36, 40, 55, 66, 70, 85, 95, 107, 120])
@pytest.mark.parametrize("there", [(), ("base", "base arena"), ("sr", "text", "audio")])
def test_no_phase_exceeds_the_budget(budget, there):
    statement = state(PARTS, PHASES, budget, 1000, there)
    lying = set(there)
    for turn, phase in zip(statement.turns, PHASES, strict=True):
        assert turn.peak <= statement.budget
        assert set(phase.needs) <= set(turn.device)
        lying = (lying - set(turn.leaves)) | set(turn.comes)
        assert lying == set(turn.device)
        assert not lying & set(turn.host)
        assert all(PARTS[name].arena_of in (None, *lying) for name in lying)
    moved = sum(PARTS[name].bytes for name in statement.alternating)
    names = [name for name, part in PARTS.items() if part.arena_of is None]
    for count in range(len(names)):  # no other choice would move less
        for gone in combinations(names, count):
            if sum(PARTS[name].bytes for name in gone) < moved:
                kept = set(names) - set(gone)
                taken = [sum(PARTS[each].bytes for each in kept | set(phase.needs)) + phase.beside for phase in PHASES]
                assert max(taken) > statement.budget


def test_what_does_not_fit_even_by_turns_is_refused():
    needed, phase = least(PARTS, PHASES)
    assert (needed, phase.name) == (36, "super-resolution")
    assert state(PARTS, PHASES, None, 0).budget == state(PARTS, PHASES, 36, 0).least == 36
    with pytest.raises(ValueError, match="device_memory: got 35 bytes, allowed: at least 36; 1 are missing"):
        state(PARTS, PHASES, 35, 0)


def test_read_in_one_glance():
    parts = {"text": Part(18 * 10**9), "base": Part(30 * 10**9)}
    phases = (Phase("text", ("text",), {"text": 3 * 10**9}), Phase("base", ("base",), {"base": 4 * 10**8}))
    assert str(state(parts, phases, 40 * 10**9, 10**11)).splitlines() == [
        "memory: peak 30.4 GB of 40.0 GB, in base; 18.0 GB on the host",
        "  text  21.0 GB = text 18.0 GB + activations 3.0 GB",
        "  base  30.4 GB = base 30.0 GB + activations 0.4 GB; on the host: text 18.0 GB",
        "memory: text, base take turns within 40.0 GB, waiting on the host",
    ]
