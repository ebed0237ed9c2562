"""MIX instances change sides by pressure, and never back and forth."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn.plan.role import Role
from cairn.plan.schedule.mix import MixRoles, MixSettings, Side, needed

SETTINGS = MixSettings()


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        (Side(0.9, 2), Side(0.1, 4), Role.PREFILL),
        (Side(0.1, 4), Side(0.9, 2), Role.DECODE),
        (Side(0.9, 2), Side(0.9, 4), None),  # nobody has room
        (Side(0.6, 2), Side(0.1, 4), None),  # nobody needs it
        (Side(0.9, 2), Side(0.1, 1), None),  # the last one stays
        (Side(0.9, 2), Side(0.35, 4), None),  # three would carry 0.47 each
        (Side(0.9, 2), Side(0.25, 4), Role.PREFILL),
    ],
)
def test_which_side_needs_one_more(prefill: Side, decode: Side, expected: Role | None) -> None:
    assert needed(prefill, decode, SETTINGS) is expected


@given(
    prefill=st.floats(0, 20),
    decode=st.floats(0, 20),
    count=st.integers(2, 12),
    settings=st.just(MixSettings(dwell_s=0)),
)
def test_a_constant_load_moves_instances_one_way_only_and_then_not_at_all(
    prefill: float, decode: float, count: int, settings: MixSettings
) -> None:
    """Demand in instances; pressure is demand by instances of that side."""
    mix, names = MixRoles(settings), [str(i) for i in range(count)]
    mix.meet(names, 0.0)
    moves: list[Role] = []
    for now in range(200):
        before = {name: mix.roles[name] for name in names}
        sides = {role: sum(one is role for one in before.values()) for role in (Role.PREFILL, Role.DECODE)}
        p, d = sides[Role.PREFILL], sides[Role.DECODE]
        assert p >= 1 <= d
        mix.observe("", Side(prefill / p, p), Side(decode / d, d), names, float(now))
        moves += [mix.roles[name] for name in names if mix.roles[name] is not before[name]]
    assert len(set(moves)) <= 1, moves
    assert len(moves) < count


@given(pressures=st.lists(st.tuples(st.floats(0, 3), st.floats(0, 3)), min_size=1, max_size=100))
def test_however_the_load_jumps_an_instance_stays_for_a_while(pressures: list[tuple[float, float]]) -> None:
    mix, names = MixRoles(SETTINGS), ["a", "b", "c", "d"]
    mix.meet(names, 0.0)
    changed: list[int] = []
    for now, (prefill, decode) in enumerate(pressures):
        before = [mix.roles[name] for name in names]
        mix.observe("", Side(prefill, 2), Side(decode, 2), names, float(now))
        if before != [mix.roles[name] for name in names]:
            changed.append(now)
    assert all(b - a >= SETTINGS.dwell_s for a, b in itertools.pairwise(changed))


def test_newcomers_even_the_sides_out_and_the_idlest_changes() -> None:
    mix = MixRoles(MixSettings(smooth_s=0.01, dwell_s=0))
    mix.meet(["a", "b", "c", "d"], 0.0)
    assert sorted(mix.roles[name] for name in "abcd") == ["DECODE", "DECODE", "PREFILL", "PREFILL"]
    decoding = [name for name in "abcd" if mix.roles[name] is Role.DECODE]
    mix.observe("", Side(0.9, 2), Side(0.1, 2), decoding[::-1], 1.0)
    assert mix.roles[decoding[1]] is Role.PREFILL
    assert mix.roles[decoding[0]] is Role.DECODE
    mix.meet(["a", decoding[1]], 2.0)
    assert mix.roles[decoding[1]] is Role.PREFILL


def test_who_was_away_comes_back_to_its_side_and_is_forgotten_after_long() -> None:
    mix = MixRoles(MixSettings(smooth_s=0.01, dwell_s=0))
    mix.meet(["a", "b", "c", "d"], 0.0)
    decoding = [name for name in "abcd" if mix.roles[name] is Role.DECODE]
    mix.observe("", Side(0.9, 2), Side(0.1, 2), decoding, 1.0)
    before = dict(mix.roles)
    assert [*before.values()].count(Role.PREFILL) == 3
    mix.meet(["x", "y"], 2.0)  # of another model
    assert mix.roles["x"] is not mix.roles["y"]
    mix.meet(["d", "c", "b", "a"], 3.0)
    assert {name: mix.roles[name] for name in "abcd"} == before
    mix.meet(["a", "b"], 700.0)
    assert {*mix.roles} == {"a", "b"}


def test_a_follower_takes_over_what_it_is_told_and_goes_on_from_there() -> None:
    mix = MixRoles(MixSettings(smooth_s=0.01, dwell_s=0))
    mix.meet(["a", "b"], 0.0)
    other = {name: Role.DECODE if role is Role.PREFILL else Role.PREFILL for name, role in mix.roles.items()}
    mix.follow(other | {"c": Role.PREFILL, "d": Role.PREFILL}, 0.5)
    assert mix.roles == other
    mix.meet(["a", "b", "c", "d"], 1.0)
    assert mix.roles == other | {"c": Role.PREFILL, "d": Role.PREFILL}
    mix.observe("", Side(0.1, 3), Side(0.9, 1), ["d"], 2.0)
    assert mix.roles["d"] is Role.PREFILL, "a follower has decided"
    mix.follow(None, 2.5)
    mix.observe("", Side(0.1, 3), Side(0.9, 1), ["d"], 3.0)
    assert mix.roles["d"] is Role.DECODE


def test_who_decides_from_now_on_begins_with_what_it_was_told_of_those_it_has_not_met() -> None:
    mix, told = MixRoles(), dict.fromkeys("abc", Role.PREFILL) | {"d": Role.DECODE}
    mix.follow(told, 0.0)
    assert not mix.roles
    mix.follow(None, 0.0)
    assert mix.roles == told
    mix.meet(["c", "d"], 1.0)
    mix.follow(None, 2.0)
    assert mix.roles == told
    mix.meet(["c", "d"], 601.0)
    assert {*mix.roles} == {"c", "d"}, "those that never came are forgotten"
