"""Eviction policies: what goes first, what their lists hold, and that their cost does not grow."""

import statistics
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.index import DEFAULT_POLICY, LRU, POLICIES, S3FIFO, EvictionPolicy, PrefixIndex, Tenure
from cairn.index.slots import NONE, RESIDENT, Keys


def chain(seed: int, blocks: int) -> Keys:
    return np.random.default_rng(seed).integers(0, 1 << 64, (blocks, 2), np.uint64)


def store(index: PrefixIndex, keys: Keys) -> int:
    first = index.touch(keys)
    index.commit(keys, first, index.reserve(len(keys) - first))
    return first


def test_the_default_is_a_policy() -> None:
    assert DEFAULT_POLICY in POLICIES
    assert all(policy.name == name for name, policy in POLICIES.items())


def listed(policy: EvictionPolicy) -> list[int]:
    """Every slot that a policy could evict next, or later without another call."""
    if isinstance(policy, Tenure):
        return policy._leaves[: policy._count[0]].tolist()
    ends = [policy._ends] if isinstance(policy, LRU) else [policy._small, policy._main]  # type: ignore[attr-defined]
    found = []
    for oldest, newest in ends:
        slot, before = int(oldest), NONE
        while slot != NONE:
            found.append(slot)
            assert policy.slots[slot]["older"] == before
            slot, before = int(policy.slots[slot]["newer"]), slot
        assert newest == before
    return found


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 2)), max_size=40),
    capacity=st.integers(1, 16),
)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_lists_hold_what_can_be_evicted(
    policy: type[EvictionPolicy], steps: list[tuple[int, int, int]], capacity: int
) -> None:
    """All leaves and only resident blocks, each once, after any stores, pins and removals."""
    index = PrefixIndex(capacity, policy)
    shared = chain(99, 2)
    for which, blocks, action in steps:
        keys = np.concatenate([shared, chain(which, blocks)])
        if action == 0:
            index.remove(keys[min(blocks, 2)])
        elif action == 1:
            index.unpin(index.pin(keys))
        else:
            store(index, keys)
        slots = index.policy.slots
        resident = set(np.flatnonzero(slots["state"] == RESIDENT).tolist())
        leaves = {slot for slot in resident if slots[slot]["child"] == NONE}
        found = listed(index.policy)
        assert len(found) == len(set(found))
        assert leaves <= set(found) <= resident


def test_lru_reserves_all_it_can_below_a_long_chain() -> None:
    """The chain's blocks stand at the old end and cannot go before their tail, which is the youngest."""
    index = PrefixIndex(5000, LRU)
    keys = chain(0, 5000)
    for stop in (4999, 5000):
        store(index, keys[:stop])
    assert len(index.reserve(1)) == 1
    assert index.match(keys) == 4999


def test_s3fifo_spares_what_is_used_from_a_scan() -> None:
    index = PrefixIndex(100, S3FIFO)
    hot = chain(0, 5)
    for seed in range(1, 4):
        store(index, hot)
        store(index, chain(seed, 1))
    for seed in range(4, 100):
        store(index, chain(seed, 10))
    assert index.match(hot) == 5


@pytest.mark.parametrize("pinned", [1, 2, 3])
def test_s3fifo_takes_what_it_can_beside_what_is_in_use(pinned: int) -> None:
    """What is worth keeping goes, too, before a writer is refused: a used block of main, or all of the small queue."""
    index = PrefixIndex(pinned + 1, S3FIFO)
    hot = [chain(number, 1) for number in range(pinned + 1)]
    for keys in hot:
        store(index, keys)
    for keys in [*hot, *hot]:
        index.touch(keys)
    pins = [index.pin(keys, use=False) for keys in hot[:pinned]]
    index.free(index.reserve(1))  # all moved on to main, and one was taken
    store(index, hot[-1])  # it is known, so it enters main
    for _ in range(4):
        index.touch(hot[0])
        index.touch(hot[-1])
    ids = index.reserve(1)
    assert len(ids) == 1
    index.free(ids)
    store(index, chain(9, 1))  # stands in the small queue, which may be that long
    assert len(index.reserve(1)) == 1
    assert sum(index.match(keys) for keys in hot) == len(pins)


def test_s3fifo_remembers_what_it_evicted() -> None:
    index = PrefixIndex(100, S3FIFO)
    back = chain(0, 5)
    for seed in range(12):
        store(index, chain(seed, 10) if seed else back)
    assert index.match(back) == 0
    store(index, back)
    for seed in range(20, 60):
        store(index, chain(seed, 10))
    assert index.match(back) == 5


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_eviction_does_not_get_slower_with_size(policy: type[EvictionPolicy]) -> None:
    """Per block, at 64 times the size; the bound leaves room for cache misses and noise, not for a search."""

    def cost(capacity: int) -> float:
        index = PrefixIndex(capacity, policy)
        seeds = iter(range(1 << 20))
        for _ in range(capacity // 64 + 1):
            store(index, chain(next(seeds), 64))
        chains = [chain(next(seeds), 64) for _ in range(60)]
        samples = []
        for keys in chains:
            start = time.perf_counter()
            store(index, keys)
            samples.append(time.perf_counter() - start)
        assert len(index) == capacity
        return statistics.median(samples)

    cost(4096)
    assert cost(262_144) < 6 * cost(4096) + 1e-4
