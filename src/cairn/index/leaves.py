"""The leaves of the forest in one array: any of them is found, added and dropped in O(1), and a random one drawn.

A policy that weighs candidates instead of keeping them in order needs just this. The slot's `older` is its place in the
array and `queue` says whether it stands there.
"""

import numpy as np
import numpy.typing as npt

from cairn.index.reuse import Worth, age_bucket
from cairn.index.rng import SEED, random_below
from cairn.index.slots import NONE, SlotIds, Slots, evictable
from cairn.jit import kernel

#: [number of leaves], so that kernels can change it.
Count = npt.NDArray[np.int64]

OUT, IN = 0, 1


@kernel
def add_leaf(slots: Slots, leaves: SlotIds, count: Count, slot: int) -> None:
    if slots[slot].queue == OUT:
        leaves[count[0]] = slot
        slots[slot].older = count[0]
        slots[slot].queue = IN
        count[0] += 1


@kernel
def drop_leaf(slots: Slots, leaves: SlotIds, count: Count, slot: int) -> None:
    if slots[slot].queue == IN:
        count[0] -= 1
        last = leaves[count[0]]
        leaves[slots[slot].older] = last
        slots[last].older = slots[slot].older
        slots[slot].queue = OUT


@kernel
def grow_leaves(slots: Slots, leaves: SlotIds, count: Count, ids: SlotIds) -> None:
    """New blocks have been linked: those without children are leaves, and their parents are none any longer."""
    for i in range(len(ids)):
        slots[ids[i]].queue = OUT
    for i in range(len(ids)):
        slot = ids[i]
        if slots[slot].parent != NONE:
            drop_leaf(slots, leaves, count, slots[slot].parent)
        if slots[slot].child == NONE:
            add_leaf(slots, leaves, count, slot)


@kernel
def cut_leaves(slots: Slots, leaves: SlotIds, count: Count, ids: SlotIds) -> None:
    """A subtree, root first, is about to go: its parent may become a leaf by that."""
    for i in range(len(ids)):
        drop_leaf(slots, leaves, count, ids[i])
    top = ids[0]
    parent = slots[top].parent
    if parent != NONE and slots[parent].child == top and slots[top].right == NONE:
        add_leaf(slots, leaves, count, parent)


SCAN, DRAW, KEEP = 512, 64, 24
"""Up to SCAN leaves are all weighed; of more, DRAW random ones and the KEEP least worthy that earlier draws have
left.
"""

POOL = np.dtype([("slot", np.int32, (KEEP,)), ("seed", np.uint64)], align=True)
Pool = npt.NDArray[np.void]


def new_pool() -> Pool:
    pool = np.zeros(1, POOL)
    pool["slot"] = NONE
    pool["seed"] = SEED
    return pool


@kernel
def _worth_of(slots: Slots, worth: Worth, slot: int, clock: float, unit: float) -> float:
    return float(worth[slots[slot].mark, age_bucket(clock - slots[slot].stamp, unit)])


@kernel
def choose_leaf(
    slots: Slots, leaves: SlotIds, count: Count, pool: Pool, worth: Worth, clock: float, unit: float
) -> int:
    """The leaf worth least of all, or of many; the older of two equals; NONE if all are in use."""
    drawing = count[0] > SCAN
    tries = KEEP + DRAW if drawing else count[0]
    slot_of = np.empty(KEEP + 1, np.int32)
    worth_of = np.empty(KEEP + 1, np.float64)
    n = 0
    for i in range(tries):
        if not drawing:
            slot = leaves[i]
        elif i < KEEP:
            slot = pool[0].slot[i]
        else:
            slot = leaves[random_below(pool, count[0])]
        if slot == NONE or slots[slot].queue == OUT or not evictable(slots, slot):
            continue
        value = _worth_of(slots, worth, slot, clock, unit)
        at = n
        new = True
        while at > 0 and new:
            other = slot_of[at - 1]
            new = other != slot
            if worth_of[at - 1] < value or (worth_of[at - 1] == value and slots[other].stamp <= slots[slot].stamp):
                break
            at -= 1
        if not new or at > KEEP:
            continue
        n = min(n + 1, KEEP + 1)
        for j in range(n - 1, at, -1):
            slot_of[j] = slot_of[j - 1]
            worth_of[j] = worth_of[j - 1]
        slot_of[at] = slot
        worth_of[at] = value
    for i in range(KEEP):
        pool[0].slot[i] = slot_of[i + 1] if i + 1 < n else NONE
    return int(slot_of[0]) if n > 0 else _any_leaf(slots, leaves, count, pool)


@kernel
def _any_leaf(slots: Slots, leaves: SlotIds, count: Count, pool: Pool) -> int:
    """Any leaf that is not in use: nearly all are."""
    if count[0] == 0:
        return NONE
    first = random_below(pool, count[0])
    for i in range(count[0]):
        slot = leaves[(first + i) % count[0]]
        if evictable(slots, slot):
            return int(slot)
    return NONE
