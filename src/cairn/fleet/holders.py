"""Who holds a block: sets of (source, tier), each kept once, however many blocks share it.

Blocks of one prompt come and go together, so few sets are in use at a time: a block says only which one it has, in 4
bytes. A reader that walks a chain looks at a set where it changes and nowhere else, and a fleet of 1,000 sources costs
a block that only one of them holds nothing extra. A set is known by the exclusive or of 128-bit values, one for each
member (Zobrist hashing), so that coming and going cost the same whatever the set's size.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.fleet.base import Tier
from cairn.index.slots import NONE
from cairn.index.table import Table, new_table, table_delete, table_find, table_insert
from cairn.jit import kernel

TIERS = len(Tier)
EMPTY = 0
"""The set without members; it is never freed."""

_SET = np.dtype([("key0", np.uint64), ("key1", np.uint64), ("refs", np.int32), ("pad", np.int32)])

Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)
_ONE, _63, _6 = np.uint64(1), np.uint64(63), np.uint64(6)
_FREE, _FRESH = 0, 1


class Holders(NamedTuple):
    """rows [room, TIERS * words]: bit s % 64 of word TIERS * (s // 64) + t says that source s holds in tier t.

    sets, table: the rows' identities and how many blocks use each. free: ids to use again. tally: how many of those,
    and the first id never used. seeds [2]: what the members' values are drawn from.
    """

    rows: Words
    sets: npt.NDArray[np.void]
    table: Table
    free: npt.NDArray[np.int32]
    tally: npt.NDArray[np.int64]
    seeds: Words


def new_holders(room: int, words: int) -> Holders:
    """Room for `room` sets of 64 * words sources. Memory is touched as it is used."""
    seeds = np.random.default_rng().integers(0, 1 << 64, 2, np.uint64)
    rows, sets = np.zeros((room, TIERS * words), np.uint64), np.zeros(room, _SET)
    return Holders(rows, sets, new_table(room), np.empty(room, np.int32), np.array([0, 1], np.int64), seeds)


def widened(old: Holders, room: int, words: int) -> Holders:
    """The same sets, under the same ids, with more room for sets or for sources."""
    new = new_holders(room, words)
    used = int(old.tally[_FRESH])
    new.rows[:used, : old.rows.shape[1]] = old.rows[:used]
    new.sets[:used] = old.sets[:used]
    new.free[: old.tally[_FREE]] = old.free[: old.tally[_FREE]]
    new.tally[:] = old.tally
    new.seeds[:] = old.seeds
    _fill_table(new)
    return new


def sets_left(holders: Holders) -> int:
    """How many more sets fit."""
    return int(len(holders.sets) - holders.tally[_FRESH] + holders.tally[_FREE])


def sets_used(holders: Holders) -> int:
    """Sets that blocks have."""
    return len(holders.sets) - sets_left(holders) - 1


def memory_of_sets(holders: Holders) -> int:
    """Bytes in use."""
    row = holders.rows.itemsize * holders.rows.shape[1] + holders.sets.itemsize + holders.free.itemsize
    return int(holders.table.nbytes + holders.tally[_FRESH] * row)


@kernel
def _fill_table(holders: Holders) -> None:
    for one in range(1, holders.tally[_FRESH]):
        if holders.sets[one].refs:
            table_insert(holders.table, holders.sets[one].key0, holders.sets[one].key1, one)


@kernel
def _mixed(value: np.uint64) -> np.uint64:
    """splitmix64's finalizer."""
    value = (value ^ (value >> _30)) * _MIX1
    value = (value ^ (value >> _27)) * _MIX2
    return np.uint64(value ^ (value >> _31))


@kernel
def tiers_of(rows: Words, one: int, source: int) -> int:
    """In which tiers a source holds the blocks of a set: bit t for tier t."""
    first, shift = TIERS * (source >> 6), np.uint64(source) & _63
    found = 0
    for tier in range(TIERS):
        if (rows[one, first + tier] >> shift) & _ONE:
            found |= 1 << tier
    return found


@kernel
def release(holders: Holders, one: int) -> None:
    """One block fewer has this set."""
    if one == EMPTY:
        return
    holders.sets[one].refs -= 1
    if holders.sets[one].refs == 0:
        table_delete(holders.table, holders.sets, one)
        holders.free[holders.tally[_FREE]] = one
        holders.tally[_FREE] += 1


@kernel
def join(holders: Holders, old: int, new: int) -> None:
    """Moves one block from one set to another that blocks have; they may be the same."""
    if old != new:
        holders.sets[new].refs += 1
        release(holders, old)


@kernel
def _take(holders: Holders) -> int:
    if holders.tally[_FREE]:
        holders.tally[_FREE] -= 1
        return int(holders.free[holders.tally[_FREE]])
    holders.tally[_FRESH] += 1
    return int(holders.tally[_FRESH] - 1)


@kernel
def turned(holders: Holders, old: int, source: int, flips: int) -> int:
    """Moves one block from the set `old` to that where `source`'s tiers in `flips` (bits) are turned over.

    There must be room for one more set.
    """
    key0, key1 = holders.sets[old].key0, holders.sets[old].key1
    for tier in range(TIERS):
        if flips >> tier & 1:
            member = np.uint64(TIERS * source + tier + 1) * _GOLDEN
            key0 ^= _mixed(holders.seeds[0] + member)
            key1 ^= _mixed(holders.seeds[1] + member)
    new = EMPTY
    if key0 or key1:
        new = table_find(holders.table, holders.sets, key0, key1)
        if new == NONE:
            new = _take(holders)
            for column in range(holders.rows.shape[1]):
                holders.rows[new, column] = holders.rows[old, column]
            first, bit = TIERS * (source >> 6), _ONE << (np.uint64(source) & _63)
            for tier in range(TIERS):
                if flips >> tier & 1:
                    holders.rows[new, first + tier] ^= bit
            holders.sets[new].key0 = key0
            holders.sets[new].key1 = key1
            holders.sets[new].refs = 0
            table_insert(holders.table, key0, key1, new)
        holders.sets[new].refs += 1
    release(holders, old)
    return new
