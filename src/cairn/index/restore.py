"""Rebuilding the forest from recovered records: in whatever order and state they are, it comes out prefix-closed."""

import numpy as np
import numpy.typing as npt

from cairn.index.slots import FREE, NONE, RESIDENT, SlotIds, Slots, link
from cairn.index.table import Table, table_delete, table_find, table_insert
from cairn.jit import kernel

Keys = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]
Seen = npt.NDArray[np.uint8]

_UNSEEN, _ON_PATH, _KEPT, _ORPHAN = 0, 1, 2, 3


@kernel
def _enter(table: Table, slots: Slots, keys: Keys, ids: SlotIds, record_of: SlotIds) -> None:
    """Enters every key once, the last record of it winning; `record_of` [capacity] tells which record a slot holds."""
    for i in range(len(ids) - 1, -1, -1):
        slot = ids[i]
        if slots[slot].state == FREE and table_find(table, slots, keys[i, 0], keys[i, 1]) == NONE:
            slots[slot].key0 = keys[i, 0]
            slots[slot].key1 = keys[i, 1]
            slots[slot].state = RESIDENT
            table_insert(table, keys[i, 0], keys[i, 1], slot)
            record_of[slot] = i


@kernel
def _climb(
    table: Table,
    slots: Slots,
    parents: Keys,
    roots: Flags,
    ids: SlotIds,
    record_of: SlotIds,
    seen: Seen,
    path: SlotIds,
    start: int,
) -> tuple[int, int, bool]:
    """Walks up from a record until its fate is known: steps put into `path`, the slot above, whether it is rooted."""
    at, depth = start, 0
    while seen[at] == _UNSEEN:
        seen[at] = _ON_PATH
        path[depth] = at
        depth += 1
        if roots[at]:
            return depth, NONE, True
        above = table_find(table, slots, parents[at, 0], parents[at, 1])
        if above == NONE:
            return depth, NONE, False
        at = record_of[above]
    return depth, ids[at], seen[at] == _KEPT


@kernel
def restore_forest(
    table: Table, slots: Slots, keys: Keys, parents: Keys, roots: Flags, ids: SlotIds, order: SlotIds
) -> int:
    """Fills an empty index: ids[i] holds keys[i] below parents[i], or as a root. Returns how many blocks were kept.

    Records whose chain does not reach a root are left out, those that run in a circle too. `order` [n] gets the slots
    kept, in the records' order except that a parent always comes before its children.
    """
    record_of = np.full(len(slots), NONE, np.int32)
    _enter(table, slots, keys, ids, record_of)
    seen = np.zeros(len(ids), np.uint8)
    path = np.empty(len(ids), np.int32)
    kept = 0
    for i in range(len(ids)):
        if record_of[ids[i]] != i:
            continue
        depth, above, rooted = _climb(table, slots, parents, roots, ids, record_of, seen, path, i)
        for step in range(depth - 1, -1, -1):
            record = path[step]
            seen[record] = _KEPT if rooted else _ORPHAN
            if rooted:
                link(slots, ids[record], above)
                above = ids[record]
                order[kept] = above
                kept += 1
    for i in range(len(ids)):
        if seen[i] == _ORPHAN:
            table_delete(table, slots, ids[i])
            slots[ids[i]].state = FREE
    return kept
