"""The fleet's blocks: key -> who holds it; and what events do to them, as kernels.

A block is one record of 32 bytes for all sources together, found through a table of 8 bytes an entry. Between events
these hold: a record that can be found is held by somebody; and a source has exactly one name for each block that it
holds, and no name for others. So a record whose last holder leaves is free at once, and no name can lead to what took
its place. Eviction breaks the second until the names of the dead are swept, and keeps their records back till then.
"""

import secrets
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.fleet.base import Tier
from cairn.fleet.holders import EMPTY, TIERS, Holders, Words, release, tiers_of, turned
from cairn.fleet.names import (
    Hashes,
    Names,
    SlotIds,
    delete_name,
    drop_copy,
    find_name,
    move_name,
    slot_at,
)
from cairn.index.slots import NONE
from cairn.index.table import Table, new_table, table_delete, table_find, table_insert
from cairn.jit import kernel
from cairn.kv import Keys

FREE, LIVE, DEAD = 0, 1, 2
"""States: to be taken; findable; evicted, and kept back until no name leads to it."""

_BLOCK = np.dtype(
    [
        ("key0", np.uint64),
        ("key1", np.uint64),
        ("link", np.uint64),  # what its key was made of, see `cairn.fleet.chains`; 0: not known
        ("holders", np.int32),
        ("used", np.uint8),  # since the clock's hand last came by
        ("state", np.uint8),
        ("pad", np.uint16),
    ]
)
assert _BLOCK.itemsize == 32

ALL_TIERS = (1 << TIERS) - 1
COPIED = 1 << Tier.VRAM
"""The tier in which a source may hold a block in several copies, of which each is told of when it comes and goes."""

_FREE_COUNT, _FRESH, _HAND = 0, 1, 2

#: Tokens of the longest blocks that have links. Longer ones are so few that hashing their chain costs little.
LINKED_TOKENS = 256


class Chain(NamedTuple):
    """Consecutive blocks of a prompt: keys [n, 2], and links [n], what each key was made of (`cairn.fleet.chains`)."""

    keys: Keys
    links: Hashes


def new_chain(count: int) -> Chain:
    """Room for `count` blocks, whose links are not known."""
    return Chain(np.empty((count, 2), np.uint64), np.zeros(count, np.uint64))


class Blocks(NamedTuple):
    """records [capacity], touched as they are used. free, tally: records to use again, how many, the first never used,
    and where the clock's hand stands. seeds [2, 6 + LINKED_TOKENS]: secret numbers that links are digested by.
    """

    records: npt.NDArray[np.void]
    table: Table
    free: SlotIds
    tally: npt.NDArray[np.int64]
    seeds: Words


def new_blocks(capacity: int, expected: int) -> Blocks:
    """Room for `capacity` records and a table for `expected` of them."""
    records, free = np.zeros(capacity, _BLOCK), np.empty(capacity, np.int32)
    seeds = np.frombuffer(secrets.token_bytes(16 * (6 + LINKED_TOKENS)), np.uint64).reshape(2, -1).copy()
    return Blocks(records, new_table(expected), free, np.zeros(3, np.int64), seeds)


def with_table(blocks: Blocks, expected: int) -> Blocks:
    """The same records with a larger table. What is being built may not change meanwhile; it may be read."""
    larger = blocks._replace(table=new_table(expected))
    _fill_table(larger)
    return larger


def taken(blocks: Blocks) -> int:
    """Records in use."""
    return int(blocks.tally[_FRESH] - blocks.tally[_FREE_COUNT])


def memory_of_blocks(blocks: Blocks) -> int:
    """Bytes in use."""
    fresh = int(blocks.tally[_FRESH])
    return blocks.table.nbytes + fresh * (blocks.records.itemsize + blocks.free.itemsize)


@kernel
def _fill_table(blocks: Blocks) -> None:
    for slot in range(blocks.tally[_FRESH]):
        if blocks.records[slot].state == LIVE:
            table_insert(blocks.table, blocks.records[slot].key0, blocks.records[slot].key1, slot)


@kernel
def is_block(records: npt.NDArray[np.void], slot: int, key0: np.uint64, key1: np.uint64) -> bool:
    """Whether a record, 0 or above, is there and the key's. A chain that came at once lies in a row: to look at the
    record behind that of the block before spares a cache miss in the table.
    """
    there = slot < len(records) and records[slot].key0 == key0
    return bool(there and records[slot].key1 == key1 and records[slot].state == LIVE)


@kernel
def find_block(records: npt.NDArray[np.void], table: Table, last: int, key0: np.uint64, key1: np.uint64) -> int:
    """The record of the block behind that of `last` (NONE: not known) in a chain, or NONE."""
    if is_block(records, last + 1, key0, key1):
        return last + 1
    return table_find(table, records, key0, key1)


@kernel
def take(blocks: Blocks, key0: np.uint64, key1: np.uint64, link: np.uint64) -> int:
    """A record for a key that has none."""
    if blocks.tally[_FREE_COUNT]:
        blocks.tally[_FREE_COUNT] -= 1
        slot = int(blocks.free[blocks.tally[_FREE_COUNT]])
    else:
        slot = int(blocks.tally[_FRESH])
        blocks.tally[_FRESH] += 1
    blocks.records[slot].key0 = key0
    blocks.records[slot].key1 = key1
    blocks.records[slot].link = link
    blocks.records[slot].holders = EMPTY
    blocks.records[slot].used = 0
    blocks.records[slot].state = LIVE
    table_insert(blocks.table, key0, key1, slot)
    return slot


@kernel
def _give(blocks: Blocks, slot: int) -> None:
    blocks.records[slot].state = FREE
    blocks.free[blocks.tally[_FREE_COUNT]] = slot
    blocks.tally[_FREE_COUNT] += 1


@kernel
def _turn(blocks: Blocks, holders: Holders, slot: int, source: int, flips: int) -> None:
    """Turns over tiers of a source; the record is free if nobody holds the block by that."""
    held = turned(holders, blocks.records[slot].holders, source, flips)
    blocks.records[slot].holders = held
    if held == EMPTY:
        table_delete(blocks.table, blocks.records, slot)
        _give(blocks, slot)


@kernel
def lose(blocks: Blocks, holders: Holders, names: Names, at: int, source: int) -> None:
    """The source does not hold what it calls so any more, in any tier, nor calls anything so."""
    slot = slot_at(names, at)
    _turn(blocks, holders, slot, source, tiers_of(holders.rows, blocks.records[slot].holders, source))
    delete_name(names, at)


@kernel
def attach(blocks: Blocks, holders: Holders, names: Names, hashes: Hashes, source: int, tier: int) -> int:
    """`source` holds in `tier` too what it calls so; returns how many names are unknown. Room for as many sets."""
    unknown = 0
    for i in range(len(hashes)):
        at = find_name(names, hashes[i])
        if at == NONE:
            unknown += 1
            continue
        slot = slot_at(names, at)
        held = blocks.records[slot].holders
        if not tiers_of(holders.rows, held, source) >> tier & 1:
            blocks.records[slot].holders = turned(holders, held, source, 1 << tier)
    return unknown


@kernel
def remove(blocks: Blocks, holders: Holders, names: Names, hashes: Hashes, source: int, tiers: int) -> tuple[int, int]:
    """`source` holds no more in `tiers` (bits) what it calls so; in COPIED alone, one copy less of it. Returns how many
    names are gone by it, and how many said nothing: unknown, or not held there. Room for as many sets.
    """
    gone, unknown = 0, 0
    for i in range(len(hashes)):
        at = find_name(names, hashes[i])
        if at == NONE:
            unknown += 1
            continue
        slot = slot_at(names, at)
        held = tiers_of(holders.rows, blocks.records[slot].holders, source)
        if not held & tiers:
            unknown += 1
            continue
        if tiers == COPIED and drop_copy(names, at):
            continue
        _turn(blocks, holders, slot, source, held & tiers)
        if not held & ~tiers:
            delete_name(names, at)
            gone += 1
    return gone, unknown


@kernel
def withdraw(blocks: Blocks, holders: Holders, names: Names, source: int) -> None:
    """`source` holds none of the blocks that these names, a part of its table, lead to. Room for as many sets."""
    for at in range(len(names)):
        slot = slot_at(names, at)
        if slot != NONE:
            _turn(blocks, holders, slot, source, tiers_of(holders.rows, blocks.records[slot].holders, source))


@kernel
def kill(blocks: Blocks, holders: Holders, victims: SlotIds, sources: Words) -> int:
    """Evicts up to len(victims) blocks; returns how many. `sources` [words] gains the bits of all who held one.

    The clock's hand passes over what was asked for or stored again since it last came by, but it does not go far for
    that: beyond eight records looked at for each victim it takes what comes.
    """
    count, looked, fresh = 0, 0, blocks.tally[_FRESH]
    while count < len(victims) and looked < 9 * len(victims) + 2 * fresh:
        looked += 1
        slot = blocks.tally[_HAND] if blocks.tally[_HAND] < fresh else 0
        blocks.tally[_HAND] = slot + 1
        if blocks.records[slot].state != LIVE:
            continue
        if blocks.records[slot].used and looked <= 8 * len(victims):
            blocks.records[slot].used = 0
            continue
        held = blocks.records[slot].holders
        for word in range(len(sources)):
            for tier in range(TIERS):
                sources[word] |= holders.rows[held, TIERS * word + tier]
        release(holders, held)
        table_delete(blocks.table, blocks.records, slot)
        blocks.records[slot].state = DEAD
        victims[count] = slot
        count += 1
    return count


@kernel
def sweep(blocks: Blocks, names: Names, kept: Names) -> int:
    """Fills the empty table `kept` with the names whose blocks live; returns how many."""
    count = 0
    for at in range(len(names)):
        slot = slot_at(names, at)
        if slot != NONE and blocks.records[slot].state == LIVE:
            move_name(names, at, kept)
            count += 1
    return count


@kernel
def bury(blocks: Blocks, victims: SlotIds) -> None:
    """The records of evicted blocks, to which no name leads any more, are free; the last given is the first taken, so
    that new chains lie in a row again.
    """
    for i in range(len(victims) - 1, -1, -1):
        _give(blocks, victims[i])
