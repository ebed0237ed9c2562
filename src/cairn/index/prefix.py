"""The prefix index of one tier: which blocks are resident, in which slots, who uses them, and which go next.

Two rules make it small. *Writers own anonymous slots*: a reserved slot has no key and cannot be found until it is
committed, so a writer that dies leaves nothing behind but its reservation. *A tier is prefix-closed*: a block is
resident only while its parent is, so how much of a prompt a tier holds is one number, found by bisection.
"""

import threading
import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.errors import InputError
from cairn.index.base import EvictionPolicy
from cairn.index.journal import Journal
from cairn.index.restore import restore_forest
from cairn.index.shared import Arrays, Generations, new_arrays, renew
from cairn.index.slots import (
    DOOMED,
    FREE,
    NONE,
    RESERVED,
    RESIDENT,
    Keys,
    SlotIds,
    Slots,
    link,
    new_slots,
    unlink,
)
from cairn.index.table import Table, new_table, table_delete, table_find, table_insert
from cairn.jit import kernel


@kernel
def _match(table: Table, slots: Slots, keys: Keys) -> int:
    """How many leading keys are resident: the tier is prefix-closed, so bisection finds the end."""
    low, high = 0, len(keys)
    if high and table_find(table, slots, keys[high - 1, 0], keys[high - 1, 1]) != NONE:
        return high
    while low < high:
        middle = (low + high) // 2
        if table_find(table, slots, keys[middle, 0], keys[middle, 1]) != NONE:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def _find(table: Table, slots: Slots, keys: Keys, out: SlotIds) -> int:
    """Slots of the leading resident keys; stops at the first that is not."""
    for i in range(len(keys)):
        slot = table_find(table, slots, keys[i, 0], keys[i, 1])
        if slot == NONE:
            return i
        out[i] = slot
    return len(keys)


@kernel
def _pin(table: Table, slots: Slots, keys: Keys, out: SlotIds) -> tuple[int, int]:
    """As `_find`, and pins them; also returns how many of them nobody had pinned."""
    first = 0
    for i in range(len(keys)):
        slot = table_find(table, slots, keys[i, 0], keys[i, 1])
        if slot == NONE:
            return i, first
        if slots[slot].pins == 0:
            first += 1
        slots[slot].pins += 1
        out[i] = slot
    return len(keys), first


@kernel
def _unpin(slots: Slots, ids: SlotIds, doomed: SlotIds) -> tuple[int, int]:
    """Returns how many slots lost their last pin, and how many of those were only waiting for it to be freed."""
    last, dead = 0, 0
    for i in range(len(ids)):
        slot = ids[i]
        slots[slot].pins -= 1
        if slots[slot].pins == 0:
            last += 1
            if slots[slot].state == DOOMED:
                doomed[dead] = slot
                dead += 1
    return last, dead


@kernel
def _take(slots: Slots, free: SlotIds, top: int, ids: SlotIds, generations: Generations) -> None:
    for i in range(len(ids)):
        ids[i] = free[top - 1 - i]
        slots[ids[i]].state = RESERVED
        if len(generations):
            renew(slots, generations, ids[i])


@kernel
def _give(slots: Slots, free: SlotIds, top: int, ids: SlotIds) -> None:
    for i in range(len(ids)):
        slots[ids[i]].state = FREE
        free[top + i] = ids[i]


@kernel
def _forget(table: Table, slots: Slots, ids: SlotIds) -> None:
    for i in range(len(ids)):
        table_delete(table, slots, ids[i])


@kernel
def _commit(table: Table, slots: Slots, keys: Keys, first: int, ids: SlotIds, done: npt.NDArray[np.bool_]) -> None:
    """Publishes keys[first + i] in ids[i]; `done[i]` says whether it was. Stops where a parent is not resident."""
    parent = NONE
    if first > 0:
        parent = table_find(table, slots, keys[first - 1, 0], keys[first - 1, 1])
        if parent == NONE:
            return
    for i in range(len(ids)):
        key0, key1 = keys[first + i, 0], keys[first + i, 1]
        found = table_find(table, slots, key0, key1)
        if found == NONE:
            found = ids[i]
            slots[found].key0 = key0
            slots[found].key1 = key1
            slots[found].state = RESIDENT
            table_insert(table, key0, key1, found)
            link(slots, found, parent)
            done[i] = True
        parent = found


@kernel
def _subtree(slots: Slots, root: int, out: SlotIds) -> int:
    """The slots of a subtree, every one before its descendants; as many as fit `out`."""
    out[0] = root
    count, at = 1, 0
    while at < count:
        child = slots[out[at]].child
        while child != NONE and count < len(out):
            out[count] = child
            count += 1
            child = slots[child].right
        at += 1
    return count


@kernel
def _detach(table: Table, slots: Slots, ids: SlotIds, freed: SlotIds) -> int:
    """Makes slots unfindable, leaves first; those nobody has pinned are to be freed, the others are doomed."""
    count = 0
    for i in range(len(ids) - 1, -1, -1):
        slot = ids[i]
        table_delete(table, slots, slot)
        unlink(slots, slot)
        if slots[slot].pins:
            slots[slot].state = DOOMED
        else:
            freed[count] = slot
            count += 1
    return count


class Occupancy(NamedTuple):
    """How the slots of an index are used: counts that add up to its capacity."""

    free: int
    reserved: int
    resident: int
    doomed: int


class PrefixIndex:
    """Block keys -> slots 0..capacity-1 of one tier, with reservation, pins and eviction.

    Keys are a chain's, uint64 [n, 2], from its first block on. `now` is in seconds of the caller's clock
    (`time.monotonic` unless given). All methods are thread-safe and take microseconds; none does I/O or raises for what
    it is asked, only for broken contracts of its caller (freeing a slot it does not own).
    """

    def __init__(
        self, capacity: int, policy: type[EvictionPolicy], memory: npt.NDArray[np.uint8] | None = None
    ) -> None:
        """memory: zeros, uint8 [shared_bytes(capacity)], for other processes to read (`IndexReader`)."""
        self.capacity = capacity
        self._slots, self._table, self._generations = (
            Arrays(new_slots(capacity), new_table(capacity), np.empty(0, np.int64))
            if memory is None
            else new_arrays(memory, capacity)
        )
        self._free: SlotIds = np.arange(capacity - 1, -1, -1, dtype=np.int32)
        self._top = capacity
        self._pinned = 0
        self._resident = 0
        self._doomed = 0
        self.evicted = 0
        self.policy = policy(self._slots)
        self._lock = threading.Lock()
        self._journals: tuple[Journal, ...] = ()

    def __len__(self) -> int:
        """Resident blocks."""
        return self._resident

    def watch(self) -> Journal:
        """Another journal of what comes and goes, for one reader, until its `end`; what is resident starts silent."""
        with self._lock:
            journal = Journal(self._table, self._slots, self._lock, self._unwatch)
            self._journals = (*self._journals, journal)
            return journal

    def occupancy(self) -> Occupancy:
        with self._lock:
            reserved = self.capacity - self._top - self._resident - self._doomed
            return Occupancy(self._top, reserved, self._resident, self._doomed)

    @property
    def pinned(self) -> int:
        """Slots with at least one pin."""
        return self._pinned

    def match(self, keys: Keys) -> int:
        """How many leading blocks are resident. Changes nothing, O(log n)."""
        with self._lock:
            return _match(self._table, self._slots, keys)

    def pin(self, keys: Keys, now: float | None = None, *, use: bool = True) -> SlotIds:
        """Slots of the leading resident blocks, kept from eviction until `unpin`; counts as their use if `use`."""
        ids = np.empty(len(keys), np.int32)
        with self._lock:
            found, first = _pin(self._table, self._slots, keys, ids)
            ids = ids[:found]
            self._pinned += first
            if use:
                self.policy.access(keys, ids, _clock(now))
        return ids

    def touch(self, keys: Keys, now: float | None = None) -> int:
        """Counts a use of the leading resident blocks without pinning them; returns how many."""
        ids = np.empty(len(keys), np.int32)
        with self._lock:
            ids = ids[: _find(self._table, self._slots, keys, ids)]
            self.policy.access(keys, ids, _clock(now))
        return len(ids)

    def unpin(self, ids: SlotIds) -> None:
        """Gives back pins, one each slot."""
        doomed = np.empty(len(ids), np.int32)
        with self._lock:
            last, dead = _unpin(self._slots, ids, doomed)
            self._pinned -= last
            if dead:
                self._doomed -= dead
                self._push_free(doomed[:dead])

    def reserve(self, count: int, now: float | None = None) -> SlotIds:
        """Up to `count` slots for the caller to fill, evicting as needed; fewer if the rest is in use."""
        with self._lock:
            short = min(count, self.capacity) - self._top
            if short > 0:
                self._evict(short, _clock(now))
            ids = np.empty(min(count, self._top), np.int32)
            _take(self._slots, self._free, self._top, ids, self._generations)
            self._top -= len(ids)
        return ids

    def commit(self, keys: Keys, first: int, ids: SlotIds, now: float | None = None) -> npt.NDArray[np.bool_]:
        """Publishes reserved slots: ids[i] holds keys[first + i]. Returns which are resident by it [len(ids)].

        The others (their key was there already, or the block before them is gone) are freed.
        """
        done = np.zeros(len(ids), np.bool_)
        with self._lock:
            _commit(self._table, self._slots, keys, first, ids, done)
            self._resident += int(np.count_nonzero(done))
            self.policy.insert(ids[done], _clock(now))
            for journal in self._journals:
                journal.added(ids[done])
            self._push_free(ids[~done])
        return done

    def free(self, ids: SlotIds) -> None:
        """Gives back reserved slots unpublished."""
        with self._lock:
            self._push_free(ids)

    def remove(self, key: Keys) -> int:
        """Removes one block (key [2]) and all that follow from it; returns how many blocks that were."""
        with self._lock:
            tree = self._subtree(key)
            if not len(tree):
                return 0
            self.policy.remove(tree)
            freed = np.empty(len(tree), np.int32)
            freed = freed[: _detach(self._table, self._slots, tree, freed)]
            self._resident -= len(tree)
            self._doomed += len(tree) - len(freed)
            for journal in self._journals:
                journal.dropped(tree)
            self._push_free(freed)
            return len(tree)

    def subtree(self, key: Keys) -> SlotIds:
        """The slots of one block (key [2]) and of all that follow from it, parents first; none if it is absent."""
        with self._lock:
            return self._subtree(key)

    def restore(
        self, keys: Keys, parents: Keys, roots: npt.NDArray[np.bool_], ids: SlotIds, now: float | None = None
    ) -> SlotIds:
        """Fills an index that was never used from recovered records, oldest first; returns the slots of those kept.

        ids[i] held keys[i] [n, 2] below parents[i] [n, 2], or as a root where roots[i]. Of records with the same key
        the last wins; blocks whose chain does not reach a root are dropped, since nobody could find them. All slots
        without a block are free. Raises InputError if the index is in use.
        """
        order = np.empty(len(ids), np.int32)
        with self._lock:
            if self._top != self.capacity:
                raise InputError(f"restore into an index with {self.capacity - self._top} slots in use: must be empty")
            kept = restore_forest(self._table, self._slots, keys, parents, roots, ids, order)
            order = order[:kept]
            # A policy takes the blocks of one prompt at a time: cut where a block does not follow from the one before.
            cuts = np.flatnonzero(self._slots["parent"][order[1:]] != order[:-1]) + 1
            for run in np.split(order, cuts) if kept else ():
                self.policy.insert(run, _clock(now))
            free = np.flatnonzero(self._slots["state"] == FREE)[::-1]
            self._free[: len(free)] = free
            self._top, self._resident = len(free), kept
        return order

    def keys_of(self, ids: SlotIds) -> Keys:
        """The keys of resident slots [n, 2]."""
        records = self._slots[ids]
        return np.stack([records["key0"], records["key1"]], axis=1)

    def _subtree(self, key: Keys) -> SlotIds:
        slot = table_find(self._table, self._slots, key[0], key[1])
        if slot == NONE:
            return np.empty(0, np.int32)
        tree = np.empty(self._resident, np.int32)
        return tree[: _subtree(self._slots, slot, tree)]

    def _unwatch(self, journal: Journal) -> None:
        with self._lock:
            self._journals = tuple(one for one in self._journals if one is not journal)

    def _evict(self, want: int, now: float) -> None:
        victims = self.policy.evict(want, self._pinned, now)
        _forget(self._table, self._slots, victims)
        self._resident -= len(victims)
        self.evicted += len(victims)
        for journal in self._journals:
            journal.dropped(victims)
        self._push_free(victims)

    def _push_free(self, ids: SlotIds) -> None:
        _give(self._slots, self._free, self._top, ids)
        self._top += len(ids)


def _clock(now: float | None) -> float:
    return time.monotonic() if now is None else now
