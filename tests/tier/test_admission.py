"""Write admission: the budget holds, and what comes again goes first."""

import numpy as np

from cairn.kv import Keys
from cairn.tier.admission import Admission, Sightings

BLOCK = 1000
DAY = 86_400.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def some_keys(count: int, seed: int) -> Keys:
    return np.random.default_rng(seed).integers(0, 1 << 63, (count, 2), np.uint64)


def admission(clock: Clock, blocks_per_day: float) -> Admission:
    return Admission(blocks_per_day * BLOCK, block_bytes=BLOCK, blocks=1000, clock=clock)


def test_without_a_budget_everything_is_admitted() -> None:
    assert Admission(None, block_bytes=BLOCK, blocks=1).admit(some_keys(10_000, 1)) == 10_000


def test_a_day_of_new_blocks_costs_the_budget_and_no_more() -> None:
    clock = Clock()
    admitted = admission(clock, 100)
    assert admitted.admit(some_keys(150, 1)) == 100
    assert admitted.admit(some_keys(10, 2)) == 0
    clock.now += DAY / 10
    assert admitted.admit(some_keys(30, 3)) == 10
    clock.now += 10 * DAY
    assert admitted.admit(some_keys(500, 4)) == 100  # unspent budget is not saved up beyond a day


def test_beyond_the_budget_only_what_was_offered_before() -> None:
    clock = Clock()
    admitted = admission(clock, 100)
    again = some_keys(40, 1)
    assert admitted.admit(some_keys(100, 2)) == 100
    assert admitted.admit(again) == 0
    assert admitted.admit(again) == 40
    mixed = np.concatenate([again[:5], some_keys(1, 3), again[5:10]])
    assert admitted.admit(mixed) == 5  # leading ones only


def test_the_overdraft_is_bounded_and_paid_back() -> None:
    clock = Clock()
    admitted = admission(clock, 100)
    again = some_keys(500, 1)
    assert admitted.admit(again) == 100
    assert admitted.admit(again) == 100
    assert admitted.admit(again) == 0
    total = 200
    for _ in range(48):
        clock.now += DAY / 24
        total += admitted.admit(again)
    assert 395 <= total <= 400
    clock.now += DAY / 2
    assert admitted.admit(some_keys(5, 9)) == 0  # still overdrawn: nothing for new blocks


def test_no_budget_at_all_admits_nothing() -> None:
    admitted = admission(Clock(), 0)
    assert admitted.admit(some_keys(5, 1)) == admitted.admit(some_keys(5, 1)) == 0


def test_sightings_know_the_latest_and_seldom_anything_else() -> None:
    sightings = Sightings(4096)
    seen = some_keys(4096, 1)
    assert np.count_nonzero(sightings.sight(seen)) < 40
    assert sightings.sight(seen).all()
    assert np.count_nonzero(sightings.sight(some_keys(1000, 2))) < 10


def test_sightings_forget_and_stay_precise() -> None:
    sightings = Sightings(512)
    first = some_keys(100, 0)
    sightings.sight(first)
    assert all(np.count_nonzero(sightings.sight(some_keys(300, seed))) < 10 for seed in range(1, 20))
    assert np.count_nonzero(sightings.sight(first)) < 10


def test_sightings_of_more_at_once_than_they_hold() -> None:
    sightings = Sightings(64)
    many = some_keys(1000, 1)
    sightings.sight(many)
    assert sightings.sight(many[-32:]).all()
