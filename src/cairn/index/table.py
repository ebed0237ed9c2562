"""The hash table of an index: block key -> slot, open addressing with linear probing and no tombstones.

Keys are digests, so their low bits are the hash. An entry is one uint64: the slot + 1 in the low half, a tag from the
key in the high half, so that a probe touches a slot's cache line only when it very likely is the right one.
"""

import numpy as np
import numpy.typing as npt

from cairn.index.slots import NONE, Slots
from cairn.jit import kernel, prefetch

Table = npt.NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(0xFFFFFFFF00000000)
_EMPTY = np.uint64(0)


def table_size(capacity: int) -> int:
    """How many entries make room for `capacity` keys at a load of at most 2/3."""
    return 1 << max(4, (capacity * 3 // 2).bit_length())


def new_table(capacity: int) -> Table:
    """Room for `capacity` keys."""
    return np.zeros(table_size(capacity), np.uint64)


@kernel
def table_expect(table: Table, key0: np.uint64) -> None:
    """Begins to fetch what `table_find` will look at."""
    prefetch(np.int64(table.ctypes.data) + 8 * np.int64(key0 & np.uint64(len(table) - 1)))


@kernel
def table_find(table: Table, slots: Slots, key0: np.uint64, key1: np.uint64) -> int:
    """The slot that holds the key, or NONE."""
    mask = np.uint64(len(table) - 1)
    at = key0 & mask
    tag = key1 & _HIGH
    while table[at] != _EMPTY:
        entry = table[at]
        if entry & _HIGH == tag:
            slot = np.int64(entry & _LOW) - 1
            if slots[slot].key0 == key0 and slots[slot].key1 == key1:
                return int(slot)
        at = (at + np.uint64(1)) & mask
    return NONE


@kernel
def table_insert(table: Table, key0: np.uint64, key1: np.uint64, slot: int) -> None:
    """Adds a key that the table does not hold."""
    mask = np.uint64(len(table) - 1)
    at = key0 & mask
    while table[at] != _EMPTY:
        at = (at + np.uint64(1)) & mask
    table[at] = (key1 & _HIGH) | np.uint64(slot + 1)


@kernel
def table_delete(table: Table, slots: Slots, slot: int) -> None:
    """Drops the key of `slot`, which the table holds; closes the gap so that no tombstone is ever needed."""
    mask = np.uint64(len(table) - 1)
    one = np.uint64(1)
    at = slots[slot].key0 & mask
    while np.int64(table[at] & _LOW) - 1 != slot:
        at = (at + one) & mask
    gap = at
    while True:
        at = (at + one) & mask
        entry = table[at]
        if entry == _EMPTY:
            break
        home = slots[np.int64(entry & _LOW) - 1].key0 & mask
        if (at - home) & mask >= (at - gap) & mask:
            table[gap] = entry
            gap = at
    table[gap] = _EMPTY
