"""What became of an index's blocks since somebody last asked: for KV events, and whoever mirrors a tier elsewhere.

A difference, not a log. A slot remembers the key that was last told of it, and stands in the queue at most once, so the
journal has a fixed size and cannot overflow; however late it is read, what it says is the whole difference, and a block
that came and went meanwhile, or moved to another slot, is not mentioned at all.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cairn.index.slots import NONE, RESIDENT, Keys, SlotIds, Slots
from cairn.index.table import Table, table_find
from cairn.jit import kernel

Flags = npt.NDArray[np.uint8]
Order = npt.NDArray[np.uint64]

_TOLD, _QUEUED, _SILENT, _NEW = np.uint8(1), np.uint8(2), np.uint8(4), np.uint8(8)
"""Of a slot: its key was told as stored; it may differ from what was told; it is resident and not to be told yet. A
silent slot is neither told nor queued. New: only while changes are put in order."""


@kernel
def _queue_up(flags: Flags, order: Order, queue: SlotIds, count: int, ids: SlotIds, clock: int) -> int:
    """Slots that have become resident, parents first; returns how many are queued now."""
    for i in range(len(ids)):
        slot = ids[i]
        order[slot] = clock + i
        if not flags[slot] & _QUEUED:
            flags[slot] |= _QUEUED
            queue[count] = slot
            count += 1
    return count


@kernel
def _drop(flags: Flags, queue: SlotIds, count: int, ids: SlotIds) -> tuple[int, int]:
    """Slots that are resident no more; returns how many are queued now, and how many of them had been silent."""
    silent = 0
    for i in range(len(ids)):
        slot = ids[i]
        if flags[slot] & _SILENT:
            flags[slot] = 0
            silent += 1
        elif not flags[slot] & _QUEUED:
            flags[slot] |= _QUEUED
            queue[count] = slot
            count += 1
    return count, silent


@kernel
def _settle(
    table: Table, slots: Slots, flags: Flags, told: Keys, queue: SlotIds, gone: Keys, new: SlotIds
) -> tuple[int, int]:
    """Compares queued slots with what was told of them, and takes what is as told.

    Returns how many keys are in `gone` (told, and nowhere any more) and how many slots in `new` (not told so far).
    """
    left = 0
    for i in range(len(queue)):
        slot = queue[i]
        flags[slot] &= ~_QUEUED
        same = slots[slot].key0 == told[slot, 0] and slots[slot].key1 == told[slot, 1]
        if flags[slot] & _TOLD and not (slots[slot].state == RESIDENT and same):
            flags[slot] &= ~_TOLD
            gone[left, 0] = told[slot, 0]
            gone[left, 1] = told[slot, 1]
            left += 1
    count = 0
    for i in range(left):
        other = table_find(table, slots, gone[i, 0], gone[i, 1])
        if other == NONE:
            gone[count, 0] = gone[i, 0]
            gone[count, 1] = gone[i, 1]
            count += 1
        else:  # it has come back to another slot
            told[other, 0] = gone[i, 0]
            told[other, 1] = gone[i, 1]
            flags[other] |= _TOLD
    fresh = 0
    for i in range(len(queue)):
        slot = queue[i]
        if slots[slot].state == RESIDENT and not flags[slot] & _TOLD:
            flags[slot] |= _TOLD
            told[slot, 0] = slots[slot].key0
            told[slot, 1] = slots[slot].key1
            new[fresh] = slot
            fresh += 1
    return count, fresh


@kernel
def _parents_first(slots: Slots, flags: Flags, new: SlotIds, out: SlotIds) -> None:
    """The same slots, each behind its parent where that is among them: a parent may have been woken after its child
    was stored, by others.
    """
    for i in range(len(new)):
        flags[new[i]] |= _NEW
    count = 0
    for i in range(len(new)):
        slot, depth = new[i], 0
        while slot != NONE and flags[slot] & _NEW:
            flags[slot] &= ~_NEW
            depth += 1
            slot = slots[slot].parent
        slot = new[i]
        for step in range(depth):
            out[count + depth - 1 - step] = slot
            slot = slots[slot].parent
        count += depth


@kernel
def _hold_back(slots: Slots, flags: Flags, new: SlotIds) -> int:
    """Of slots in order, those behind one that is silent become so, too; returns how many are left, and leaves them in
    `new`.
    """
    count = 0
    for i in range(len(new)):
        slot = new[i]
        parent = slots[slot].parent
        if parent != NONE and flags[parent] & _SILENT:
            flags[slot] = _SILENT
        else:
            new[count] = slot
            count += 1
    return count


@kernel
def _silence(flags: Flags, ids: SlotIds) -> int:
    """Takes back that slots were told; returns how many are silent by it."""
    count = 0
    for i in range(len(ids)):
        slot = ids[i]
        if flags[slot] & _TOLD:
            flags[slot] &= ~_TOLD
            # A queued slot is compared anew anyway: without _TOLD it is a new block, or none.
            if not flags[slot] & _QUEUED:
                flags[slot] |= _SILENT
                count += 1
    return count


@kernel
def _wake(table: Table, slots: Slots, flags: Flags, keys: Keys, out: SlotIds) -> int:
    """The slots of those keys that are silent, which they cease to be."""
    count = 0
    for i in range(len(keys)):
        slot = table_find(table, slots, keys[i, 0], keys[i, 1])
        if slot == NONE:
            break  # prefix-closed: nothing follows
        if flags[slot] & _SILENT:
            flags[slot] &= ~_SILENT
            out[count] = slot
            count += 1
    return count


class Changes(NamedTuple):
    """stored: keys [n, 2] that can be found now and could not before, every parent before its children; slots: where
    they are [n]. removed: keys [m, 2] that were told and cannot be found any more.
    """

    stored: Keys
    slots: SlotIds
    removed: Keys


NOTHING = Changes(np.empty((0, 2), np.uint64), np.empty(0, np.int32), np.empty((0, 2), np.uint64))


class JournalReader(Protocol):
    """What the reader of a journal does with it, wherever the index is: see `Journal`."""

    @property
    def capacity(self) -> int: ...

    def changes(self) -> Changes: ...

    def silence(self, slots: SlotIds) -> None: ...

    def mention(self, keys: Keys) -> None: ...

    def clear(self) -> None: ...


class Journal:
    """Follows one index for one reader; made by `PrefixIndex.watch`. About 30 bytes a slot.

    Every block is *told* (its reader has had it in `stored`), *silent* (resident, and held back until it is mentioned),
    or gone. What was resident before the journal began is silent, and so is what is stored behind a silent block: a
    reader whose mentions are on their way would else hear of a child, stored meanwhile, before its parent. `added` and
    `dropped` are the index's, which calls them under its lock; the others are the reader's, and take it. Thread-safe.
    """

    def __init__(self, table: Table, slots: Slots, lock: threading.Lock, ended: "Callable[[Journal], None]") -> None:
        """Under the lock."""
        self._table = table
        self._slots = slots
        self._lock = lock
        self._ended = ended
        self._told: Keys = np.zeros((len(slots), 2), np.uint64)
        self._flags: Flags = np.where(slots["state"] == RESIDENT, _SILENT, np.uint8(0))
        self._order: Order = np.zeros(len(slots), np.uint64)
        self._queue: SlotIds = np.empty(len(slots), np.int32)
        self._count = 0
        self._clock = 1
        self._silent = int(np.count_nonzero(self._flags))

    @property
    def capacity(self) -> int:
        """Slots of the index."""
        return len(self._slots)

    def added(self, ids: SlotIds) -> None:
        """These slots have become resident, parents first."""
        self._count = _queue_up(self._flags, self._order, self._queue, self._count, ids, self._clock)
        self._clock += len(ids)

    def dropped(self, ids: SlotIds) -> None:
        """These slots are resident no more."""
        self._count, silent = _drop(self._flags, self._queue, self._count, ids)
        self._silent -= silent

    def changes(self) -> Changes:
        """The difference since the last call; from now on it counts as told."""
        if not self._count:  # without the lock: what comes now is there the next time
            return NOTHING
        with self._lock:
            queue = self._queue[: self._count]
            gone, new = np.empty((len(queue), 2), np.uint64), np.empty(len(queue), np.int32)
            left, fresh = _settle(self._table, self._slots, self._flags, self._told, queue, gone, new)
            self._count = 0
            new = new[:fresh]
            new, slots = new[np.argsort(self._order[new])], np.empty(fresh, np.int32)
            _parents_first(self._slots, self._flags, new, slots)
            slots = slots[: _hold_back(self._slots, self._flags, slots)]
            self._silent += fresh - len(slots)
            return Changes(self._told[slots], slots, gone[:left])

    def silence(self, slots: SlotIds) -> None:
        """Takes back that these slots, of the latest changes, were told: they are silent, and so will be their end."""
        with self._lock:
            self._silent += _silence(self._flags, slots)

    def mention(self, keys: Keys) -> None:
        """What is silent of a chain [n, 2], from its first block on, is to be told with the next changes."""
        if not self._silent:
            return
        woken = np.empty(len(keys), np.int32)
        with self._lock:
            woken = woken[: _wake(self._table, self._slots, self._flags, keys, woken)]
            self._silent -= len(woken)
            self.added(woken)

    def clear(self) -> None:
        """Nothing counts as told any more, and whatever is resident is silent."""
        with self._lock:
            self._flags[:] = np.where(self._slots["state"] == RESIDENT, _SILENT, np.uint8(0))
            self._silent = int(np.count_nonzero(self._flags))
            self._count = 0

    def end(self) -> None:
        """Nobody reads it any more. Idempotent."""
        self._ended(self)
