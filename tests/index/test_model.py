"""The prefix index, with every policy, against a dict: what is found, kept, evicted and given back."""

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cairn.index import POLICIES, EvictionPolicy, PrefixIndex

Keys = npt.NDArray[np.uint64]


def key_of(path: tuple[int, ...], collide: bool) -> tuple[int, int]:
    """A key for a path in the tree; with `collide` all keys fall on three places of the table, some with one tag."""
    full = (1 << 64) - 1
    digest = hash(path) & full
    return ((digest % 3 | digest << 40) & full, digest) if collide else (digest, digest * 31 & full)


def chain_of(path: tuple[int, ...], collide: bool) -> Keys:
    keys = [key_of(path[: i + 1], collide) for i in range(len(path))]
    return np.array(keys, np.uint64).reshape(-1, 2)


paths = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)


class IndexModel(RuleBasedStateMachine):
    """`resident` maps each findable path to its slot; `pins` and `reserved` say what must not be touched."""

    policy: ClassVar[type[EvictionPolicy]]

    @initialize(capacity=st.sampled_from([1, 2, 7, 20]), collide=st.booleans())
    def start(self, capacity: int, collide: bool) -> None:
        self.index = PrefixIndex(capacity, self.policy)
        self.collide = collide
        self.now = 0.0
        self.pins: list[tuple[tuple[int, ...], npt.NDArray[np.int32]]] = []
        self.reserved: list[npt.NDArray[np.int32]] = []
        self.known: set[tuple[int, ...]] = set()

    def keys(self, path: tuple[int, ...]) -> Keys:
        return chain_of(path, self.collide)

    def clock(self) -> float:
        self.now += 0.5
        return self.now

    def resident(self) -> dict[tuple[int, ...], int]:
        """What the index finds, asked block by block: `match` is then held against it."""
        found = {}
        for path in self.known:
            slots = self.index.pin(self.keys(path)[-1:], use=False)
            if len(slots):
                found[path] = int(slots[0])
                self.index.unpin(slots)
        return found

    @rule(path=paths)
    def store(self, path: tuple[int, ...]) -> None:
        keys = self.keys(path)
        held = self.index.touch(keys, self.clock())
        ids = self.index.reserve(len(path) - held, self.now)
        self.index.commit(keys, held, ids, self.now)
        self.known |= {path[:stop] for stop in range(1, len(path) + 1)}

    @rule(path=paths)
    def pin(self, path: tuple[int, ...]) -> None:
        ids = self.index.pin(self.keys(path), self.clock())
        if len(ids):
            self.pins.append((path[: len(ids)], ids))

    @rule(which=st.integers(0, 20))
    def unpin(self, which: int) -> None:
        if self.pins:
            self.index.unpin(self.pins.pop(which % len(self.pins))[1])

    @rule(count=st.integers(1, 8))
    def reserve(self, count: int) -> None:
        ids = self.index.reserve(count, self.clock())
        if len(ids):
            self.reserved.append(ids)

    @rule(which=st.integers(0, 20))
    def free(self, which: int) -> None:
        if self.reserved:
            self.index.free(self.reserved.pop(which % len(self.reserved)))

    @rule(path=paths, which=st.integers(0, 20), first=st.integers(0, 8))
    def commit_what_was_reserved(self, path: tuple[int, ...], which: int, first: int) -> None:
        if self.reserved and first < len(path):
            ids = self.reserved.pop(which % len(self.reserved))
            take = min(len(ids), len(path) - first)
            before = self.resident()
            done = self.index.commit(self.keys(path), first, ids[:take], self.clock())
            self.index.free(ids[take:])
            self.known |= {path[:stop] for stop in range(1, len(path) + 1)}
            there = first == 0 or path[:first] in before
            assert done.tolist() == [there and path[: first + i + 1] not in before for i in range(take)]

    @rule(path=paths)
    def remove(self, path: tuple[int, ...]) -> None:
        before = self.resident()
        gone = [other for other in before if other[: len(path)] == path] if path in before else []
        assert self.index.remove(self.keys(path)[-1]) == len(gone)
        assert set(self.resident()) == set(before) - set(gone)

    @rule(path=paths)
    def match(self, path: tuple[int, ...]) -> None:
        resident = self.resident()
        expected = next((i for i in range(len(path)) if path[: i + 1] not in resident), len(path))
        assert self.index.match(self.keys(path)) == expected

    @invariant()
    def everything_adds_up(self) -> None:
        if not hasattr(self, "index"):
            return
        resident = self.resident()
        occupancy = self.index.occupancy()
        assert sum(occupancy) == self.index.capacity
        assert min(occupancy) >= 0
        assert occupancy.resident == len(resident) == len(self.index)
        assert occupancy.reserved == sum(len(ids) for ids in self.reserved)
        assert all(path[:-1] in resident for path in resident if len(path) > 1), "not prefix-closed"
        pinned = {int(slot) for _, ids in self.pins for slot in ids}
        assert self.index.pinned == len(pinned)
        owned = [slot for ids in self.reserved for slot in ids.tolist()]
        assert len(set(owned)) == len(owned), "a slot reserved twice"
        assert not set(owned) & (pinned | set(resident.values())), "a slot in use was given away"
        for path, ids in self.pins:
            for stop, slot in enumerate(ids.tolist(), 1):
                now = resident.get(path[:stop])
                # A pinned block is where it was, or was removed; its slot is nobody else's in either case.
                assert now == slot or slot not in resident.values()

    def teardown(self) -> None:
        if hasattr(self, "index"):
            for _, ids in self.pins:
                self.index.unpin(ids)
            for ids in self.reserved:
                self.index.free(ids)
            assert self.index.occupancy().doomed == 0
            assert len(self.index.reserve(self.index.capacity)) == self.index.capacity, "something cannot be evicted"


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_index_against_a_dict(policy: type[EvictionPolicy]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Machine", (IndexModel,), {"policy": policy})
    run_state_machine_as_test(machine, settings=settings(max_examples=200, stateful_step_count=50, deadline=None))


def test_lru_evicts_the_tail_of_what_was_used_longest_ago() -> None:
    index = PrefixIndex(6, POLICIES["lru"])
    old, new = chain_of((0, 0, 0), False), chain_of((1, 1, 1), False)
    for now, keys in enumerate((old, new)):
        index.commit(keys, 0, index.reserve(3), float(now))
    index.free(index.reserve(2))
    assert (index.match(old), index.match(new)) == (1, 3)
    index.touch(old, 5.0)
    index.free(index.reserve(4))
    assert (index.match(old), index.match(new)) == (1, 1)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_full_index_of_pinned_blocks_reserves_nothing_and_comes_back(policy: type[EvictionPolicy]) -> None:
    index = PrefixIndex(100, policy)
    keys = chain_of(tuple(range(100)), False)
    index.commit(keys, 0, index.reserve(100))
    pinned = index.pin(keys)
    assert len(index.reserve(1)) == 0
    index.unpin(pinned[99:])
    assert len(index.reserve(50)) == 1
    index.unpin(pinned[:99])
    assert len(index.reserve(100)) == 99
