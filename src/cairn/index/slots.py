"""The slot record: everything an index knows of one resident block, in one 64-byte cache line; and the tree it spans.

Blocks form a forest: a block's parent is the block before it in its prompt. The links below keep, for each slot, its
parent, its first child and its siblings, so that a leaf is known in one look and a subtree is walked without a search.
"""

import numpy as np
import numpy.typing as npt

from cairn.jit import kernel

NONE = -1

FREE, RESERVED, RESIDENT, DOOMED = 0, 1, 2, 3
"""States: on the free list; held by a writer, not findable; findable; removed while pinned, freed at the last unpin."""

SLOT = np.dtype(
    [
        ("key0", np.uint64),  # the block key, 16 bytes
        ("key1", np.uint64),
        ("parent", np.int32),  # the forest
        ("child", np.int32),
        ("left", np.int32),
        ("right", np.int32),
        ("pins", np.int32),
        ("state", np.uint8),
        ("queue", np.uint8),  # from here on the eviction policy's own: which list the slot stands in, ...
        ("uses", np.uint8),
        ("mark", np.uint8),
        ("older", np.int32),
        ("newer", np.int32),
        ("stamp", np.float64),  # seconds
        ("born", np.float32),
        ("aux", np.uint32),
    ],
    align=True,
)
assert SLOT.itemsize == 64

Slots = npt.NDArray[np.void]
SlotIds = npt.NDArray[np.int32]
#: Keys of a chain, uint64 [n, 2]; see `cairn.kv.keys`.
Keys = npt.NDArray[np.uint64]


def new_slots(capacity: int, memory: npt.NDArray[np.uint8] | None = None) -> Slots:
    """Records of free slots. memory: zeros, where they are to stand."""
    slots: Slots = np.zeros(capacity, SLOT) if memory is None else memory.view(SLOT)
    for link in ("parent", "child", "left", "right", "older", "newer"):
        slots[link] = NONE
    return slots


@kernel
def link(slots: Slots, slot: int, parent: int) -> None:
    """Hangs `slot` under `parent` (NONE: a root)."""
    slots[slot].parent = parent
    slots[slot].child = NONE
    slots[slot].left = NONE
    slots[slot].right = NONE
    if parent != NONE:
        first = slots[parent].child
        slots[slot].right = first
        if first != NONE:
            slots[first].left = slot
        slots[parent].child = slot


@kernel
def unlink(slots: Slots, slot: int) -> None:
    """Takes a leaf out of the forest."""
    parent, left, right = slots[slot].parent, slots[slot].left, slots[slot].right
    if left != NONE:
        slots[left].right = right
    elif parent != NONE:
        slots[parent].child = right
    if right != NONE:
        slots[right].left = left
    slots[slot].parent = NONE
    slots[slot].left = NONE
    slots[slot].right = NONE


@kernel
def evictable(slots: Slots, slot: int) -> bool:
    """Whether a policy may choose the slot now: findable, unused, and nothing hangs below it."""
    return bool(slots[slot].state == RESIDENT and slots[slot].pins == 0 and slots[slot].child == NONE)
