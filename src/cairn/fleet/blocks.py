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
from cairn.fleet.holders import EMPTY, TIERS, Holders, Words, join, release, tiers_of, turned
from cairn.fleet.names import (
    Hashes,
    Names,
    SlotIds,
    add_copy,
    add_name,
    delete_name,
    drop_copy,
    expect_name,
    find_name,
    move_name,
    slot_at,
)
from cairn.index.slots import NONE
from cairn.index.table import Table, new_table, table_delete, table_expect, table_find, table_insert
from cairn.jit import kernel
from cairn.kv import Keys

FREE, LIVE, DEAD = 0, 1, 2
"""States: to be taken; findable; evicted, and kept back until no name leads to it."""

_BLOCK = np.dtype(
    [
        ("key0", np.uint64),
        ("key1", np.uint64),
        ("link", np.uint64),  # what its key was made of, see `cairn.fleet.links`; 0: not known
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

#: Blocks whose entries are fetched at once: one after the other, each would wait for memory.
_AHEAD = 32

_FREE_COUNT, _FRESH, _HAND = 0, 1, 2

#: Tokens of the longest blocks that have links. Longer ones are so few that hashing their chain costs little.
LINKED_TOKENS = 256


class Chain(NamedTuple):
    """Consecutive blocks of a prompt: keys [n, 2], and links [n], what each key was made of (`cairn.fleet.links`)."""

    keys: Keys
    links: Hashes


def new_chain(count: int) -> Chain:
    """Room for `count` blocks, whose links are not known."""
    return Chain(np.empty((count, 2), np.uint64), np.zeros(count, np.uint64))


class Blocks(NamedTuple):
    """records [capacity], touched as they are used. free, tally: records to use again, how many, the first never used,
    and where the clock's hand stands. seeds [2, 6 + LINKED_TOKENS]: secret numbers that
    links are digested by.
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
def _take(blocks: Blocks, key0: np.uint64, key1: np.uint64, link: np.uint64) -> int:
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
def _lose(blocks: Blocks, holders: Holders, names: Names, at: int, source: int) -> None:
    """The source does not hold what it calls so any more, in any tier, nor calls anything so."""
    slot = slot_at(names, at)
    _turn(blocks, holders, slot, source, tiers_of(holders.rows, blocks.records[slot].holders, source))
    delete_name(names, at)


@kernel
def store(
    blocks: Blocks,
    holders: Holders,
    names: Names,
    chain: Chain,
    hashes: Hashes,
    source: int,
    tier: int,
    copies: int,
    wary: bool,
) -> tuple[int, int, int, int]:
    """`source` holds the chain's blocks in `tier` and calls them hashes[i]; returns how many names are new, how many
    not taken, how many copies not counted, and how many blocks were looked at: all, or, if `wary`, up to the first name
    that is not taken.

    A second name for what the source holds already is not taken: one removal could not undo both. Where a name meant
    another block so far, the source holds that one no more. Blocks from `copies` on that are held in `tier` under this
    name are one more copy. There must be room for as many records and names and for twice as many sets.
    """
    keys = chain.keys
    added, refused, uncounted, slot = 0, 0, 0, NONE
    before, after = NONE, NONE  # what became of the last block's set: a prompt's blocks mostly have the same
    for i in range(len(hashes)):
        if i % _AHEAD == 0:
            for next_one in range(i, min(i + _AHEAD, len(hashes))):
                expect_name(names, hashes[next_one])
                table_expect(blocks.table, keys[next_one, 0])
        at = find_name(names, hashes[i])
        slot += 1
        if not is_block(blocks.records, slot, keys[i, 0], keys[i, 1]):
            slot = table_find(blocks.table, blocks.records, keys[i, 0], keys[i, 1])
        known = at != NONE and slot_at(names, at) == slot
        if slot == NONE:
            slot = _take(blocks, keys[i, 0], keys[i, 1], chain.links[i])
        elif not known and tiers_of(holders.rows, blocks.records[slot].holders, source):
            refused += 1
            if at != NONE:
                _lose(blocks, holders, names, at, source)
                added -= 1
                before = NONE
            if wary:
                return added, refused, uncounted, i + 1
            continue
        else:
            blocks.records[slot].used = 1
        if not known:
            if at != NONE:
                _lose(blocks, holders, names, at, source)
                added -= 1
                before = NONE
            add_name(names, hashes[i], slot)
            added += 1
        held = blocks.records[slot].holders
        if held == before:
            join(holders, held, after)
        else:
            before = after = held
            if not tiers_of(holders.rows, held, source) >> tier & 1:
                after = turned(holders, held, source, 1 << tier)
        blocks.records[slot].holders = after
        if after == held and i >= copies and not add_copy(names, at):
            uncounted += 1
    return added, refused, uncounted, len(hashes)


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
def restore(
    blocks: Blocks,
    holders: Holders,
    names: Names,
    keys: Keys,
    hashes: Hashes,
    tiers: npt.NDArray[np.uint8],
    source: int,
) -> int:
    """`source` holds keys[i] in tiers[i] (bits, not 0) and calls it hashes[i]; returns how many names are new. Blocks
    that are new get records in this order. Room as for `store`, and for twice as many sets.
    """
    added, first = 0, 0
    links = np.zeros(len(keys), np.uint64)
    while first < len(keys):
        stop = first + 1
        while stop < len(keys) and tiers[stop] == tiers[first]:
            stop += 1
        begun = False
        for tier in range(TIERS):
            if not tiers[first] >> tier & 1:
                continue
            if begun:
                attach(blocks, holders, names, hashes[first:stop], source, tier)
            else:
                chain, part = Chain(keys[first:stop], links[first:stop]), hashes[first:stop]
                added += store(blocks, holders, names, chain, part, source, tier, len(part), False)[0]
                begun = True
        first = stop
    return added


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
