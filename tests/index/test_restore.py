"""Rebuilding an index from records: the model is a dictionary of parents, walked to the root."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.errors import InputError
from cairn.index import LRU, PrefixIndex

CAPACITY = 12


def key(number: int) -> np.ndarray:
    return np.array([number * 0x9E3779B97F4A7C15 & (1 << 64) - 1, number], np.uint64)


def keys(*numbers: int) -> np.ndarray:
    return np.array([key(n) for n in numbers], np.uint64).reshape(-1, 2)


def restored(records: list[tuple[int, int, int]]) -> tuple[PrefixIndex, list[int]]:
    """records: (key, parent or 0 for a root, slot), oldest first."""
    index = PrefixIndex(CAPACITY, LRU)
    roots = np.array([parent == 0 for _, parent, _ in records], np.bool_)
    slots = np.array([slot for *_, slot in records], np.int32)
    kept = index.restore(keys(*(r[0] for r in records)), keys(*(r[1] for r in records)), roots, slots)
    return index, kept.tolist()


def expected(records: list[tuple[int, int, int]]) -> dict[int, int]:
    """key -> slot of what must be kept."""
    found: dict[int, tuple[int, int]] = {}
    taken: set[int] = set()
    for number, parent, slot in reversed(records):
        if number not in found and slot not in taken:
            found[number] = (parent, slot)
            taken.add(slot)

    def rooted(number: int) -> bool:
        seen = set()
        while number in found and number not in seen:
            seen.add(number)
            number = found[number][0]
            if number == 0:
                return True
        return False

    return {number: slot for number, (_, slot) in found.items() if rooted(number)}


record = st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, CAPACITY - 1))


@settings(deadline=None)  # the first call compiles
@given(st.lists(record, max_size=14))
def test_keeps_exactly_what_reaches_a_root(records: list[tuple[int, int, int]]) -> None:
    index, kept = restored(records)
    want = expected(records)
    assert sorted(kept) == sorted(want.values())
    assert len(index) == len(want)
    for number in range(1, 10):
        # One key alone is looked up as if it were a root's: whether it is there, whatever is above it.
        assert index.pin(keys(number)).tolist() == ([want[number]] if number in want else [])
    free, reserved, resident, doomed = index.occupancy()
    assert (free, reserved, resident, doomed) == (CAPACITY - len(want), 0, len(want), 0)
    new = index.reserve(CAPACITY)
    assert sorted([*new.tolist(), *want.values()]) == list(range(CAPACITY))


@settings(deadline=None)  # the first call compiles
@given(st.lists(record, max_size=14))
def test_everything_kept_can_be_evicted(records: list[tuple[int, int, int]]) -> None:
    index, _ = restored(records)
    assert sorted(index.reserve(CAPACITY).tolist()) == list(range(CAPACITY))
    assert len(index) == 0


def test_oldest_goes_first_and_tails_before_roots() -> None:
    index, _ = restored([(1, 0, 5), (2, 1, 6), (3, 0, 7), (4, 3, 8)])
    index.reserve(CAPACITY - 4)
    assert index.reserve(1).tolist() == [6]
    assert index.reserve(1).tolist() == [5]
    assert index.reserve(1).tolist() == [8]


def test_subtree_is_parents_first() -> None:
    index, _ = restored([(3, 1, 3), (1, 0, 1), (2, 1, 2), (4, 3, 4)])
    tree = index.subtree(key(1)).tolist()
    assert sorted(tree) == [1, 2, 3, 4]
    assert tree[0] == 1
    assert tree.index(3) < tree.index(4)
    assert index.subtree(key(9)).tolist() == []


def test_refuses_an_index_in_use() -> None:
    index, _ = restored([(1, 0, 0)])
    with pytest.raises(InputError, match="must be empty"):
        index.restore(keys(2), keys(0), np.ones(1, np.bool_), np.array([3], np.int32))
