"""The journal against a plain model: whoever applies its changes to a set has what the index really holds."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from cairn.index import POLICIES, PrefixIndex
from cairn.index.journal import Journal
from tests.index.test_model import IndexModel, Keys, chain_of, paths


class Reader:
    """A mirror of an index, kept by its journal's changes alone; every change must make sense."""

    def __init__(self, index: PrefixIndex) -> None:
        self.index = index
        self.journal: Journal = index.watch()
        self.blocks: set[bytes] = set()

    def read(self, unknown: Callable[[bytes], bool] = lambda _: False) -> list[bytes]:
        """Takes the changes in; keys that are `unknown` are silenced. Returns what was new."""
        changes = self.journal.changes()
        for key in changes.removed:
            self.blocks.remove(key.tobytes())
        assert len(changes.slots) == len(changes.stored)
        new = [key.tobytes() for key in changes.stored]
        assert not self.blocks & {*new}, "told twice"
        assert len({*new}) == len(new)
        silent = np.array([unknown(key) for key in new], np.bool_)
        self.journal.silence(changes.slots[silent])
        self.blocks |= {key for key, quiet in zip(new, silent, strict=True) if not quiet}
        return new


class JournalModel(IndexModel):
    """Does all that the index's own model does, and reads the journal now and then."""

    def reader_of(self) -> Reader:
        """Made by the first rule that needs it: what was stored before it is silent."""
        if not hasattr(self, "reader"):
            self.silent = {self.key(path) for path in self.resident()}
            self.reader = Reader(self.index)
        return self.reader

    def key(self, path: tuple[int, ...]) -> bytes:
        return bytes(self.keys(path)[-1].tobytes())

    def held(self) -> set[bytes]:
        return {self.key(path) for path in self.resident()}

    @rule(residue=st.sampled_from([None, None, 0, 1, 2]))
    def read(self, residue: int | None) -> None:
        """residue: keys of this kind are silenced."""
        reader = self.reader_of()
        new = reader.read(lambda key: residue is not None and key[0] % 3 == residue)
        self.silent = self.held() - reader.blocks
        place = {self.key(path): path for path in self.known}
        seen: set[tuple[int, ...]] = set()
        for path in map(place.__getitem__, new):
            assert all(path[:stop] in seen or self.key(path[:stop]) not in new for stop in range(1, len(path)))
            seen.add(path)

    @rule(path=paths)
    def mention(self, path: tuple[int, ...]) -> None:
        reader = self.reader_of()
        reader.read()
        reader.journal.mention(self.keys(path))
        named = {self.key(path[:stop]) for stop in range(1, len(path) + 1)}
        expected = (self.held() - reader.blocks) & named
        assert {*reader.read()} == expected
        self.silent = self.held() - reader.blocks

    @rule()
    def clear(self) -> None:
        reader = self.reader_of()
        reader.journal.clear()
        reader.blocks.clear()
        self.silent = self.held()
        assert reader.read() == []

    @rule()
    def everything_not_silent_is_told(self) -> None:
        reader = self.reader_of()
        silent = self.silent & self.held()
        reader.read()
        held = self.held()
        assert reader.blocks <= held
        # What was silent, went and came back since the last read is told: nobody can know it was the same.
        place = {self.key(path): path for path in self.known}
        for path in map(place.__getitem__, held - reader.blocks - silent):
            assert self.key(path[:-1]) not in reader.blocks, "only what is behind something silent is silent unasked"

    @invariant()
    def the_count_of_the_silent_is_right(self) -> None:
        if hasattr(self, "reader"):
            journal = self.reader.journal
            assert journal._silent == int(np.count_nonzero(journal._flags & 4))
            assert journal._count == int(np.count_nonzero(journal._flags & 2))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_mirror_by_journal(policy: Any) -> None:
    machine = type("Machine", (JournalModel,), {"policy": policy})
    run_state_machine_as_test(machine, settings=settings(max_examples=200, stateful_step_count=50, deadline=None))


def store(index: PrefixIndex, keys: Keys) -> None:
    held = index.touch(keys)
    index.commit(keys, held, index.reserve(len(keys) - held))


def test_what_comes_and_goes_between_two_reads_is_not_told() -> None:
    index = PrefixIndex(8, POLICIES["lru"])
    reader = Reader(index)
    keys = chain_of((0, 1, 2), False)
    store(index, keys)
    assert reader.read() == [key.tobytes() for key in keys]
    store(index, chain_of((1,), False))
    index.remove(chain_of((1,), False)[-1])
    index.remove(keys[1])
    index.free(index.reserve(1))
    store(index, keys)
    changes = reader.journal.changes()
    assert len(changes.stored) == len(changes.removed) == 0


def test_a_child_waits_for_its_parent_to_be_mentioned() -> None:
    """As an engine of several on a node reads: it names a chain after the changes with the parent were taken out, and
    somebody else stores the child before the chain is mentioned.
    """
    index = PrefixIndex(8, POLICIES["lru"])
    reader = Reader(index)
    keys = chain_of((0, 1, 2), False)
    store(index, keys[:1])
    reader.read(unknown=lambda _: True)
    store(index, keys)
    assert reader.read() == []
    reader.journal.mention(keys[:2])
    assert reader.read() == [key.tobytes() for key in keys[:2]]
    reader.journal.mention(keys)
    assert reader.read() == [keys[2].tobytes()]


def test_a_block_that_moved_is_removed_once_and_only_at_its_end() -> None:
    index = PrefixIndex(4, POLICIES["lru"])
    reader = Reader(index)
    keys = chain_of((0,), False)
    store(index, keys)
    reader.read()
    held = index.reserve(1)  # so that it comes back to another slot
    index.remove(keys[0])
    held = np.concatenate([held, index.reserve(1)])
    store(index, keys)
    assert reader.read() == []
    index.remove(keys[0])
    assert len(reader.journal.changes().removed) == 1
    index.free(held)
    assert len(reader.journal.changes().removed) == 0


def test_no_change_is_lost_between_threads() -> None:
    index = PrefixIndex(64, POLICIES["lru"])
    reader = Reader(index)
    chains = [chain_of((branch, *range(9)), False) for branch in range(20)]

    def churn(seed: int) -> None:
        chance = np.random.default_rng(seed)
        for _ in range(2000):
            keys = chains[chance.integers(len(chains))]
            if chance.random() < 0.2:
                index.remove(keys[chance.integers(len(keys))])
            else:
                store(index, keys)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        reader.read()
    for thread in threads:
        thread.join(60)
    reader.read()
    held = {keys[i].tobytes() for keys in chains for i in range(index.match(keys))}
    assert reader.blocks == held


def test_a_parent_that_is_woken_after_its_child_was_stored_comes_first() -> None:
    index = PrefixIndex(8, POLICIES["lru"])
    journal, keys = index.watch(), np.arange(1, 11, dtype=np.uint64).reshape(5, 2)
    index.commit(keys, 0, index.reserve(2))
    journal.silence(journal.changes().slots)
    index.commit(keys, 2, index.reserve(3))
    journal.mention(keys[:2])
    assert np.array_equal(journal.changes().stored, keys)
