"""An index in shared memory, and how other processes find in it without asking who keeps it, while he changes it.

What a reader finds there he cannot pin. So each slot has a *generation*, which is counted up when the slot is given to
a writer, before he can write: a reader notes it, copies, and looks whether it is the same afterwards (a sequence lock,
one a slot). If it is, nobody has written there meanwhile, and he has what he was looking for.

    reserve  forget the slot's key, then count its generation up          (release)
    note     read the generation, then see that the slot has the key      (acquire)
    copy
    check    read the generation again, behind everything before it       (fence)

Who reads a new generation does not see the key of an old one any more; and who has read an old one finds another when
he checks. Table and records may change under a reader's eyes: he finds nothing then, or something that he checks.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.index.slots import NONE, RESERVED, RESIDENT, SLOT, Keys, SlotIds, Slots, new_slots
from cairn.index.table import Table, table_find, table_size
from cairn.jit import fence, kernel, load_acquire, store_release

#: Counts a slot how often it was given to a writer, int64 [capacity]; [0] where nobody else reads the index.
Generations = npt.NDArray[np.int64]


class Arrays(NamedTuple):
    """What an index consists of that others may read."""

    slots: Slots
    table: Table
    generations: Generations


def shared_bytes(capacity: int) -> int:
    """How much memory the arrays of an index take that others read."""
    return capacity * (SLOT.itemsize + 8) + table_size(capacity) * 8


def arrays_in(memory: npt.NDArray[np.uint8], capacity: int) -> Arrays:
    """The arrays that stand in memory, uint8 [shared_bytes], at a multiple of 64 bytes."""
    records, entries = capacity * SLOT.itemsize, table_size(capacity) * 8
    table, generations = memory[records : records + entries], memory[records + entries : shared_bytes(capacity)]
    return Arrays(memory[:records].view(SLOT), table.view(np.uint64), generations.view(np.int64))


def new_arrays(memory: npt.NDArray[np.uint8], capacity: int) -> Arrays:
    """Those of an empty index, in memory that is all zeros."""
    arrays = arrays_in(memory, capacity)
    new_slots(capacity, memory[: capacity * SLOT.itemsize])
    return arrays


@kernel
def renew(slots: Slots, generations: Generations, slot: int) -> None:
    """A slot is given to a writer: whoever reads it without a pin has nothing from now on."""
    slots[slot].key0 = 0
    slots[slot].key1 = 0
    slots[slot].state = RESERVED
    address = np.int64(generations.ctypes.data) + 8 * np.int64(slot)
    store_release(address, generations[slot] + 1)


@kernel
def _note(table: Table, slots: Slots, generations: Generations, keys: Keys, rows: SlotIds, noted: Generations) -> int:
    """Slots of the leading keys that are resident, and their generations; how many."""
    address, found = np.int64(generations.ctypes.data), 0
    for i in range(len(keys)):
        slot = table_find(table, slots, keys[i, 0], keys[i, 1])
        if slot == NONE:
            break
        noted[i] = load_acquire(address + 8 * np.int64(slot))
        if slots[slot].state != RESIDENT or slots[slot].key0 != keys[i, 0] or slots[slot].key1 != keys[i, 1]:
            break
        rows[i] = slot
        found = i + 1
    fence()  # what is copied now is copied after all of this was seen
    return found


@kernel
def _unchanged(generations: Generations, rows: SlotIds, noted: Generations) -> bool:
    fence()
    address = np.int64(generations.ctypes.data)
    changed = 0
    for i in range(len(rows)):
        changed |= load_acquire(address + 8 * np.int64(rows[i])) ^ noted[i]
    return changed == 0


class Noted(NamedTuple):
    """Where blocks are, int32 [n], as nobody promises, and the generations of these slots, int64 [n]."""

    rows: SlotIds
    generations: Generations


class IndexReader:
    """An index that another process keeps in this memory. Thread-safe. Never waits."""

    def __init__(self, memory: npt.NDArray[np.uint8], capacity: int) -> None:
        """memory: as for `arrays_in`; kept as long as this."""
        self._slots, self._table, self._generations = arrays_in(memory, capacity)

    def has(self, keys: Keys) -> bool:
        """Whether the last block of a chain is resident, and so, as likely as not, all of them."""
        return bool(len(keys)) and table_find(self._table, self._slots, keys[-1, 0], keys[-1, 1]) != NONE

    def note(self, keys: Keys) -> Noted:
        """Where the leading resident blocks are now."""
        rows, generations = np.empty(len(keys), np.int32), np.empty(len(keys), np.int64)
        found = _note(self._table, self._slots, self._generations, keys, rows, generations)
        return Noted(rows[:found], generations[:found])

    def unchanged(self, noted: Noted) -> bool:
        """Whether what was read from these rows until now, since they were noted, was what had been looked for."""
        return _unchanged(self._generations, *noted)
