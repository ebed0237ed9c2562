"""S3-FIFO: three static queues (Yang et al., "FIFO queues are all you need for cache eviction", SOSP'23), on the tree.

New blocks enter a small queue of a tenth of the capacity; what is used there twice moves on to the main queue, the rest
leaves and is remembered for a while, and what comes back in that time enters the main queue at once. Main gives a used
block another round. One thing differs from the paper: only leaves leave. A block that is met with others below it is
parked and comes back to the old end with the last of them.
"""

import numpy as np
import numpy.typing as npt

from cairn.index.base import EvictionPolicy
from cairn.index.ghosts import Ghosts, add_ghost, drop_ghost, find_ghost, new_ghosts
from cairn.index.lru import Ends, push_newest, push_oldest, take_out
from cairn.index.slots import NONE, Keys, SlotIds, Slots, evictable, unlink
from cairn.jit import kernel

PARKED, SMALL, MAIN = 0, 1, 2
"""Values of a slot's `queue`. `mark` says to which queue a parked slot belongs; `uses` counts up to MOST."""

SMALL_SHARE = 0.1
MOST = 3

#: [blocks that belong to SMALL, evictions so far], so that kernels can change them.
Counts = npt.NDArray[np.int64]


@kernel
def _enter(slots: Slots, small: Ends, main: Ends, counts: Counts, slot: int, queue: int) -> None:
    push_newest(slots, small if queue == SMALL else main, slot)
    slots[slot].queue = queue
    slots[slot].mark = queue
    if queue == SMALL:
        counts[0] += 1


@kernel
def _leave(slots: Slots, small: Ends, main: Ends, counts: Counts, slot: int) -> None:
    if slots[slot].queue != PARKED:
        take_out(slots, small if slots[slot].queue == SMALL else main, slot)
    if slots[slot].mark == SMALL:
        counts[0] -= 1


@kernel
def _unpark(slots: Slots, small: Ends, main: Ends, slot: int) -> None:
    if slots[slot].queue == PARKED:
        queue = slots[slot].mark
        push_oldest(slots, small if queue == SMALL else main, slot)
        slots[slot].queue = queue


@kernel
def _insert(slots: Slots, small: Ends, main: Ends, counts: Counts, ghosts: Ghosts, ids: SlotIds, memory: int) -> None:
    for i in range(len(ids) - 1, -1, -1):
        slot = ids[i]
        slots[slot].uses = 0
        at = find_ghost(ghosts, slots[slot].key0, slots[slot].key1)
        queue = SMALL
        if at >= 0:
            if counts[1] - ghosts[at].time <= memory:
                queue = MAIN
            drop_ghost(ghosts, at)
        _enter(slots, small, main, counts, slot, queue)


@kernel
def _access(slots: Slots, ids: SlotIds) -> None:
    for i in range(len(ids)):
        slots[ids[i]].uses = min(MOST, slots[ids[i]].uses + 1)


@kernel
def _remove(slots: Slots, small: Ends, main: Ends, counts: Counts, ids: SlotIds) -> None:
    for i in range(len(ids)):
        _leave(slots, small, main, counts, ids[i])
    top = ids[0]
    parent = slots[top].parent
    if parent != NONE and slots[parent].child == top and slots[top].right == NONE:
        _unpark(slots, small, main, parent)


@kernel
def _evict(
    slots: Slots,
    small: Ends,
    main: Ends,
    counts: Counts,
    ghosts: Ghosts,
    victims: SlotIds,
    room: int,
) -> int:
    found = 0
    # The first of main met in use since main has changed: met again, there is nothing else in it.
    first, stuck = NONE, False
    while found < len(victims):
        from_small = small[0] != NONE and (counts[0] > room or main[0] == NONE or stuck)
        slot = small[0] if from_small else main[0]
        if slot == NONE or (stuck and not from_small):
            break
        if slots[slot].child == NONE and not evictable(slots, slot):
            if not from_small:
                stuck = slot == first
                first = slot if first == NONE else first
            _leave(slots, small, main, counts, slot)
            _enter(slots, small, main, counts, slot, MAIN)
            continue
        parent = slots[slot].parent
        if slots[slot].child != NONE:
            take_out(slots, small if from_small else main, slot)
            slots[slot].queue = PARKED
        elif slots[slot].uses > (1 if from_small else 0):
            _leave(slots, small, main, counts, slot)
            _enter(slots, small, main, counts, slot, MAIN)
            slots[slot].uses = 0 if from_small else slots[slot].uses - 1
        else:
            _leave(slots, small, main, counts, slot)
            if from_small:
                add_ghost(ghosts, slots[slot].key0, slots[slot].key1, counts[1], 0.0, 1, 0)
            counts[1] += 1
            unlink(slots, slot)
            victims[found] = slot
            found += 1
            if parent != NONE and slots[parent].child == NONE:
                _unpark(slots, small, main, parent)
            elif from_small:
                continue  # main is as it was
        first, stuck = NONE, False
    return found


class S3FIFO(EvictionPolicy):
    """See the module. Eviction costs O(1) amortized: a block passes each queue once for each of its counted uses."""

    name = "s3fifo"

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._room = max(1, int(SMALL_SHARE * len(slots)))
        self._memory = len(slots)
        self._small: Ends = np.full(2, NONE, np.int32)
        self._main: Ends = np.full(2, NONE, np.int32)
        self._counts: Counts = np.zeros(2, np.int64)
        self._ghosts = new_ghosts(len(slots))
        self._last = b""

    def insert(self, ids: SlotIds, now: float) -> None:
        _insert(self.slots, self._small, self._main, self._counts, self._ghosts, ids, self._memory)

    def access(self, keys: Keys, ids: SlotIds, now: float) -> None:
        # A request may be touched more than once; with nobody between, that is one use.
        last = keys[-1:].tobytes()
        if last != self._last:
            self._last = last
            _access(self.slots, ids)

    def remove(self, ids: SlotIds) -> None:
        _remove(self.slots, self._small, self._main, self._counts, ids)

    def evict(self, want: int, pinned: int, now: float) -> SlotIds:
        victims = np.empty(want, np.int32)
        found = _evict(self.slots, self._small, self._main, self._counts, self._ghosts, victims, self._room)
        return victims[:found]
