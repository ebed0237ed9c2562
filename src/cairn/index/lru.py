"""Least recently used, tail first: of the blocks of one request, the last goes first."""

import numpy as np
import numpy.typing as npt

from cairn.index.base import EvictionPolicy
from cairn.index.slots import NONE, Keys, SlotIds, Slots, evictable, unlink
from cairn.jit import kernel

#: The two ends of a list: [oldest, newest].
Ends = npt.NDArray[np.int32]

PARKED, LISTED = 0, 1
"""Values of a slot's `queue`: out of the list until its last child goes; in it."""


@kernel
def push_newest(slots: Slots, ends: Ends, slot: int) -> None:
    slots[slot].older = ends[1]
    slots[slot].newer = NONE
    if ends[1] != NONE:
        slots[ends[1]].newer = slot
    else:
        ends[0] = slot
    ends[1] = slot


@kernel
def push_oldest(slots: Slots, ends: Ends, slot: int) -> None:
    slots[slot].newer = ends[0]
    slots[slot].older = NONE
    if ends[0] != NONE:
        slots[ends[0]].older = slot
    else:
        ends[1] = slot
    ends[0] = slot


@kernel
def take_out(slots: Slots, ends: Ends, slot: int) -> None:
    older, newer = slots[slot].older, slots[slot].newer
    if older != NONE:
        slots[older].newer = newer
    else:
        ends[0] = newer
    if newer != NONE:
        slots[newer].older = older
    else:
        ends[1] = older


@kernel
def _use(slots: Slots, ends: Ends, ids: SlotIds, inserted: bool) -> None:
    for i in range(len(ids) - 1, -1, -1):
        if not inserted and slots[ids[i]].queue == LISTED:
            take_out(slots, ends, ids[i])
        push_newest(slots, ends, ids[i])
        slots[ids[i]].queue = LISTED


@kernel
def _unpark(slots: Slots, ends: Ends, slot: int) -> None:
    """Puts a parked block that has just become a leaf at the old end: it was met there before its children were."""
    if slot != NONE and slots[slot].child == NONE and slots[slot].queue == PARKED:
        push_oldest(slots, ends, slot)
        slots[slot].queue = LISTED


@kernel
def _remove(slots: Slots, ends: Ends, ids: SlotIds) -> None:
    for i in range(len(ids)):
        if slots[ids[i]].queue == LISTED:
            take_out(slots, ends, ids[i])
    top = ids[0]
    parent = slots[top].parent
    if parent != NONE and slots[parent].queue == PARKED and slots[parent].child == top and slots[top].right == NONE:
        push_oldest(slots, ends, parent)
        slots[parent].queue = LISTED


@kernel
def _evict(slots: Slots, ends: Ends, victims: SlotIds, pinned: int) -> int:
    found = 0
    while found < len(victims) and ends[0] != NONE:
        slot = ends[0]
        take_out(slots, ends, slot)
        if evictable(slots, slot):
            parent = slots[slot].parent
            unlink(slots, slot)
            victims[found] = slot
            found += 1
            _unpark(slots, ends, parent)
        elif slots[slot].child != NONE:
            slots[slot].queue = PARKED
        else:
            # In use, which is as good as used now. Met for the second time, all of the list is in use.
            push_newest(slots, ends, slot)
            pinned -= 1
            if pinned < 0:
                break
    return found


class LRU(EvictionPolicy):
    """Exact LRU over blocks; a request's blocks count as used from its tail to its root, so tails go first.

    A block that stands at the old end while younger blocks hang below it is parked: it leaves the list and returns to
    the old end with the last of them, which is when LRU would take it. Each use pays for one parking, so eviction is
    O(1).
    """

    name = "lru"

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._ends: Ends = np.full(2, NONE, np.int32)

    def insert(self, ids: SlotIds, now: float) -> None:
        _use(self.slots, self._ends, ids, True)

    def access(self, keys: Keys, ids: SlotIds, now: float) -> None:
        _use(self.slots, self._ends, ids, False)

    def remove(self, ids: SlotIds) -> None:
        _remove(self.slots, self._ends, ids)

    def evict(self, want: int, pinned: int, now: float) -> SlotIds:
        victims = np.empty(want, np.int32)
        return victims[: _evict(self.slots, self._ends, victims, pinned)]
