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
    roles, names = MixRoles(settings), [str(i) for i in range(count)]
    roles.meet(names)
    moves: list[Role] = []
    for now in range(200):
        before = {name: roles[name] for name in names}
        sides = {role: sum(one is role for one in before.values()) for role in (Role.PREFILL, Role.DECODE)}
        p, d = sides[Role.PREFILL], sides[Role.DECODE]
        assert p >= 1 <= d
        roles.observe(Side(prefill / p, p), Side(decode / d, d), names, float(now))
        moves += [roles[name] for name in names if roles[name] is not before[name]]
    assert len(set(moves)) <= 1, moves
    assert len(moves) < count


@given(pressures=st.lists(st.tuples(st.floats(0, 3), st.floats(0, 3)), min_size=1, max_size=100))
def test_however_the_load_jumps_an_instance_stays_for_a_while(pressures: list[tuple[float, float]]) -> None:
    roles, names = MixRoles(SETTINGS), ["a", "b", "c", "d"]
    roles.meet(names)
    changed: list[int] = []
    for now, (prefill, decode) in enumerate(pressures):
        before = [roles[name] for name in names]
        roles.observe(Side(prefill, 2), Side(decode, 2), names, float(now))
        if before != [roles[name] for name in names]:
            changed.append(now)
    assert all(b - a >= SETTINGS.dwell_s for a, b in itertools.pairwise(changed))


def test_newcomers_even_the_sides_out_and_the_idlest_changes() -> None:
    roles = MixRoles(MixSettings(smooth_s=0.01, dwell_s=0))
    roles.meet(["a", "b", "c", "d"])
    assert sorted(roles[name] for name in "abcd") == ["DECODE", "DECODE", "PREFILL", "PREFILL"]
    decoding = [name for name in "abcd" if roles[name] is Role.DECODE]
    roles.observe(Side(0.9, 2), Side(0.1, 2), decoding[::-1], 1.0)
    assert roles[decoding[1]] is Role.PREFILL
    assert roles[decoding[0]] is Role.DECODE
    roles.meet(["a", decoding[1]])
    assert roles[decoding[1]] is Role.PREFILL


def test_who_was_away_for_a_while_comes_back_to_its_side() -> None:
    """Who rests after a failure, or has just failed the request at hand, is not among those that may be sent to."""
    roles, names = MixRoles(MixSettings(smooth_s=0.01, dwell_s=0)), ["a", "b", "c", "d"]
    roles.meet(names)
    roles.observe(Side(0.9, 2), Side(0.1, 2), names, 1.0)
    before = {name: roles[name] for name in names}
    assert sorted(before.values()) == ["DECODE", "PREFILL", "PREFILL", "PREFILL"]
    for name in names:
        roles.meet([one for one in names if one != name])
        roles.meet(names)
    assert {name: roles[name] for name in names} == before


def test_names_that_never_come_back_are_forgotten() -> None:
    roles = MixRoles()
    for number in range(1000):
        roles.meet([str(number), str(number + 1)])
    assert len(roles._roles) < 100
