"""What Tenure learns: hazards from samples, and what keeping a block is worth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.index import PrefixIndex, Tenure
from cairn.index.kinds import FRESH_KINDS, KINDS, LEVELS, PACES, SHARES, fresh_kind, group_of, used_kind
from cairn.index.reuse import (
    AGES,
    ROOM,
    age_bucket,
    begin_sample,
    bucket_widths,
    end_sample,
    learn,
    lru_reach,
    new_samples,
    worth_by_age,
)
from cairn.index.table import new_table

UNIT = 1000.0


def test_buckets_partition_time() -> None:
    edges = np.concatenate([[0], np.cumsum(bucket_widths(UNIT))])
    assert len(edges) == AGES + 1
    for bucket in range(AGES):
        middle = (edges[bucket] + edges[bucket + 1]) / 2
        assert age_bucket(middle, UNIT) == bucket
    assert age_bucket(1e30, UNIT) == AGES - 1


@settings(max_examples=100, deadline=None)
@given(hazard=st.lists(st.floats(0, 0.4), min_size=2, max_size=12))
def test_worth_is_the_best_ratio_of_hits_to_time(hazard: list[float]) -> None:
    widths = np.linspace(0.5, 2, len(hazard))
    found = np.empty(len(hazard))
    worth_by_age(np.array(hazard), widths, found)
    for first in range(len(hazard)):
        alive, hits, time, best = 1.0, 0.0, 0.0, 0.0
        for h, width in zip(hazard[first:], widths[first:], strict=True):
            chance = 1 - np.exp(-h * width)
            hits += alive * chance
            time += alive * (chance / h if h > 1e-12 else width)
            alive *= 1 - chance
            best = max(best, hits / time)
        assert found[first] == pytest.approx(best, rel=1e-3, abs=1e-6)


def _learned(gaps: dict[int, list[float | None]], clock: float) -> np.ndarray:
    """Worths after samples of the given kinds whose next use came after a gap, or (None) has not come yet."""
    samples, waiting = new_samples(), new_table(ROOM)
    at = 0
    for kind, values in gaps.items():
        for gap in values:
            key = np.uint64(at + 1)
            begin_sample(samples, waiting, at, key, key, kind, 1.0, 0.0)
            if gap is not None:
                end_sample(samples, waiting, key, key, gap)
            at += 1
    worth = np.zeros((KINDS, AGES), np.float32)
    learn(samples, bucket_widths(UNIT), clock, UNIT, worth)
    return worth


def test_a_kind_that_returns_after_a_while_is_worth_most_just_before() -> None:
    worth = _learned({0: [1000.0 + i for i in range(500)], 1: [None] * 500}, clock=1e5)
    before, at, after = (age_bucket(age, UNIT) for age in (10.0, 950.0, 3000.0))
    assert worth[0, before] < worth[0, at]
    assert worth[0, after] < worth[0, at] / 5
    assert worth[1, before] < worth[0, before] / 5


def test_lru_keeps_a_block_until_as_many_others_were_used() -> None:
    widths = bucket_widths(UNIT)
    never = np.zeros(AGES)
    assert lru_reach(never, widths, UNIT) == pytest.approx(UNIT)
    # Half of all uses come again at once: of t uses, t / 2 are of distinct blocks.
    at_once = never.copy()
    at_once[0] = np.log(2) / widths[0]
    assert lru_reach(at_once, widths, UNIT) == pytest.approx(2 * UNIT, rel=0.01)
    # 500 blocks in turn fit, so LRU keeps them for ever.
    in_turn = never.copy()
    in_turn[age_bucket(500.0, UNIT)] = 50 / widths[age_bucket(500.0, UNIT)]
    assert lru_reach(in_turn, widths, UNIT) == pytest.approx(widths.sum())


def test_a_kind_seen_once_is_worth_what_its_group_is() -> None:
    rare, common = fresh_kind(2, 0, False), fresh_kind(1, 2, False)
    worth = _learned({common: [200.0] * 1000, rare: [None]}, clock=1e5)
    near = age_bucket(100.0, UNIT)
    assert worth[rare, near] == pytest.approx(worth[common, near], rel=0.5)


def test_kinds_are_distinct_and_grouped() -> None:
    fresh = {fresh_kind(o, s, last) for o in range(LEVELS + 1) for s in range(SHARES) for last in (False, True)}
    used = {
        used_kind(uses, UNIT * 2.0**pace * 0.7, share, UNIT)
        for uses in (2, 3, 4, 6, 8, 12, 16)
        for pace in range(-1, PACES - 1)
        for share in range(SHARES)
    }
    assert fresh == set(range(FRESH_KINDS))
    assert used == set(range(FRESH_KINDS, KINDS))
    assert {group_of(kind) for kind in fresh} == {0}
    assert {group_of(kind) for kind in used} == set(range(1, LEVELS))


def test_samples_follow_all_requests_whether_stored_or_not() -> None:
    """A prompt that is asked for evenly is learned although the index never stores it."""
    index = PrefixIndex(64, Tenure)
    random = np.random.default_rng(0)
    keys = random.integers(0, 1 << 64, (4, 2), np.uint64)
    for _ in range(50):
        index.touch(keys)
        index.touch(random.integers(0, 1 << 64, (16, 2), np.uint64))
    samples = index.policy._samples  # type: ignore[attr-defined]
    again = samples[(samples["weight"] > 0) & (samples["gap"] > 0)]
    assert (again["gap"] == 20).all()
    # A sample of each use but the last, and one more of the first, whose last block is of a kind of its own.
    assert len(again) == 50
    # They weigh the root of their runs' lengths.
    assert sorted(again["weight"]) == pytest.approx([1.0, np.sqrt(3.0)] + 48 * [2.0])
