"""The leaves of the forest in one array: any of them is found, added and dropped in O(1), and a random one drawn.

A policy that weighs candidates instead of keeping them in order needs just this. The slot's `older` is its place in the
array and `queue` says whether it stands there.
"""

import numpy as np
import numpy.typing as npt

from cairn.index.slots import NONE, SlotIds, Slots
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
