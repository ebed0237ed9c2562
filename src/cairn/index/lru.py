"""Least recently used, tail first: of the blocks of one request, the last goes first."""

import numpy as np
import numpy.typing as npt

from cairn.index.base import EvictionPolicy
from cairn.index.slots import NONE, SlotIds, Slots, evictable, unlink
from cairn.jit import kernel

#: The two ends of a list: [oldest, newest].
Ends = npt.NDArray[np.int32]


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
def _insert(slots: Slots, ends: Ends, ids: SlotIds) -> None:
    for i in range(len(ids) - 1, -1, -1):
        push_newest(slots, ends, ids[i])


@kernel
def _access(slots: Slots, ends: Ends, ids: SlotIds) -> None:
    for i in range(len(ids) - 1, -1, -1):
        take_out(slots, ends, ids[i])
        push_newest(slots, ends, ids[i])


@kernel
def _remove(slots: Slots, ends: Ends, ids: SlotIds) -> None:
    for i in range(len(ids)):
        take_out(slots, ends, ids[i])


@kernel
def _evict(slots: Slots, ends: Ends, victims: SlotIds, steps: int) -> int:
    found = 0
    while found < len(victims) and steps > 0 and ends[0] != NONE:
        steps -= 1
        slot = ends[0]
        take_out(slots, ends, slot)
        if evictable(slots, slot):
            unlink(slots, slot)
            victims[found] = slot
            found += 1
        else:
            # In use, or a younger block hangs below it: as good as used now. Each pays for one step only.
            push_newest(slots, ends, slot)
    return found


class LRU(EvictionPolicy):
    """Exact LRU over blocks; a request's blocks count as used from its tail to its root, so tails go first."""

    name = "lru"

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._ends: Ends = np.full(2, NONE, np.int32)

    def insert(self, ids: SlotIds, now: float) -> None:
        _insert(self.slots, self._ends, ids)

    def access(self, ids: SlotIds, now: float) -> None:
        _access(self.slots, self._ends, ids)

    def remove(self, ids: SlotIds) -> None:
        _remove(self.slots, self._ends, ids)

    def evict(self, want: int, pinned: int, now: float) -> SlotIds:
        victims = np.empty(want, np.int32)
        # Two turns: what stands above its own children in the list is met once before and once after them.
        found = _evict(self.slots, self._ends, victims, 4 * want + 2 * pinned + 64)
        return victims[:found]
