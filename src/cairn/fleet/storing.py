"""What `BlockStored` does to the index, as kernels: a chain's blocks stored, many events' at once, or a copy's.

Events that follow one another in a chain are taken as one, up to a name that is not taken: an event behind such a block
has no parent then, as if it had come by itself.
"""

import numpy as np
import numpy.typing as npt

from cairn.fleet.blocks import Blocks, Chain, attach, find_block, lose, take
from cairn.fleet.chains import follow
from cairn.fleet.holders import EMPTY, TIERS, Holders, join, tiers_of, turned
from cairn.fleet.names import Hashes, Names, add_copy, add_name, expect_name, find_name, place_of, slot_at
from cairn.index.slots import NONE
from cairn.index.table import table_expect
from cairn.jit import kernel
from cairn.kv import Keys
from cairn.kv.keys import Tokens

BATCH = 1024
"""Blocks changed, or hashed, under a hold of the index's lock while somebody waits for it: a tenth of a millisecond."""

#: How many blocks ahead entries are fetched: what comes too early is gone again, and a core fetches few lines at once.
_AHEAD = 16

Told = npt.NDArray[np.uint64]


@kernel
def _expect(blocks: Blocks, names: Names, keys: Keys, hashes: Hashes, first: int, stop: int, scattered: bool) -> None:
    """Begins to fetch what these blocks are found by."""
    for i in range(first, min(stop, len(hashes))):
        expect_name(names, hashes[i])
        if scattered:
            table_expect(blocks.table, keys[i, 0])


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
    scattered: bool,
) -> tuple[int, int, int, int]:
    """`source` holds the chain's blocks in `tier` and calls them hashes[i]; returns how many names are new, how many
    not taken, how many copies not counted, and how many blocks were looked at: all, or, if `wary`, up to the first name
    not taken. A second name for what the source holds is not taken: one removal could not undo both. Where a name meant
    another block so far, the source holds that one no more. Blocks from `copies` on that it holds in `tier` under this
    name are one more copy. scattered: the blocks' records are not known to lie in a row. There must be room for as many
    records and names and for twice as many sets.
    """
    records, keys = blocks.records, chain.keys
    added, refused, uncounted, slot = 0, 0, 0, NONE
    # What became of the last block's set, and the source's tiers in it: a prompt's blocks mostly have the same.
    before, after, mine = NONE, NONE, 0
    _expect(blocks, names, keys, hashes, 0, _AHEAD, scattered)
    for i in range(len(hashes)):
        _expect(blocks, names, keys, hashes, i + _AHEAD, i + _AHEAD + 1, scattered)
        at = place_of(names, hashes[i])
        named = slot_at(names, at)
        slot = find_block(records, blocks.table, slot, keys[i, 0], keys[i, 1])
        known = slot != NONE and named == slot
        held = records[slot].holders if slot != NONE else EMPTY
        tiers = mine if held == before else tiers_of(holders.rows, held, source)
        if named != NONE and not known:
            lose(blocks, holders, names, at, source)
            added, before = added - 1, NONE
            at = place_of(names, hashes[i])
        if tiers and not known:
            refused += 1
            if wary:
                return added, refused, uncounted, i + 1
            continue
        if slot == NONE:
            slot = take(blocks, keys[i, 0], keys[i, 1], chain.links[i])
        else:
            records[slot].used = 1
        if not known:
            add_name(names, at, hashes[i], slot)
            added += 1
        if held == before:
            join(holders, held, after)
        else:
            before, mine = held, tiers
            after = held if tiers >> tier & 1 else turned(holders, held, source, 1 << tier)
        records[slot].holders = after
        if after == held and i >= copies and not add_copy(names, at):
            uncounted += 1
    return added, refused, uncounted, len(hashes)


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
                added += store(blocks, holders, names, chain, part, source, tier, len(part), False, True)[0]
                begun = True
        first = stop
    return added


#: Where a cursor stands: in which event, at which block; the last two: the key of the block before, if inside an event.
EVENT, BLOCK = 0, 1
CURSOR_WORDS = 4


@kernel
def _first_of(told: Told, event: int) -> int:
    """Its first block; also behind the last event."""
    return int(np.int64(told[event - 1, 2])) if event else 0


@kernel
def _end_of_chain(hashes: Hashes, told: Told, event: int, stop: int) -> int:
    """Where the chain of events ends that begins with `event`, each behind the one before; `stop` at the latest."""
    end = _first_of(told, event + 1)
    while end < stop:
        event += 1
        if told[event, 1] or told[event, 0] != hashes[end - 1]:
            return end
        end = _first_of(told, event + 1)
    return min(end, stop)


@kernel
def _parent(blocks: Blocks, names: Names, told: Told, event: int, root: Keys, seed: Keys) -> tuple[bool, int]:
    """Whether what an event is behind is known: `seed` [1, 2] is its key then; and its record, NONE before a prompt."""
    if told[event, 1]:
        seed[0, 0], seed[0, 1] = root[0, 0], root[0, 1]
        return True, NONE
    name = find_name(names, told[event, 0])
    if name == NONE:
        return False, NONE
    slot = slot_at(names, name)
    seed[0, 0] = blocks.records[slot].key0
    seed[0, 1] = blocks.records[slot].key1
    return True, slot


@kernel
def store_many(
    blocks: Blocks,
    holders: Holders,
    names: Names,
    root: Keys,
    rows: Tokens,
    hashes: Hashes,
    told: Told,
    cursor: npt.NDArray[np.uint64],
    most: int,
    source: int,
    tier: int,
    copies: bool,
    waiting: npt.NDArray[np.int64],
) -> tuple[int, int, int, int]:
    """Goes on from `cursor` for at most `most` blocks, as `store` does, which says what there must be room for; ends
    early if somebody waits (`FairLock.waiting`).

    rows [blocks, tokens]: of all blocks; told: see `StoredMany`; root [1, 2]: the key before a prompt's first block. An
    event whose parent `source` does not hold by then is left out. copies: blocks of events with a parent that are held
    already are further copies. Returns how many names are new, how many not taken, how many copies not counted, and how
    many blocks were left out.
    """
    added, refused, uncounted, orphans = 0, 0, 0, 0
    event, at = int(np.int64(cursor[EVENT])), int(np.int64(cursor[BLOCK]))
    begun = _first_of(told, event)
    first, stop = at, min(len(hashes), at + most)
    keys, links = np.empty((most, 2), np.uint64), np.empty(most, np.uint64)
    seed = np.empty((1, 2), np.uint64)
    seed[0, 0], seed[0, 1] = cursor[2], cursor[3]
    while at < stop and (at == first or not waiting[0]):
        slot = NONE
        if at == begun:
            known, slot = _parent(blocks, names, told, event, root, seed)
            if not known:
                event += 1
                begun = _first_of(told, event)
                orphans += begun - at
                at = begun
                continue
        end = _end_of_chain(hashes, told, event, min(stop, at + BATCH))
        part, count = Chain(keys[: end - at], links[: end - at]), end - at
        hashed = follow(blocks, seed, slot, rows[at:end], part, count)[1]
        counted = count
        if copies:
            counted = _first_of(told, event + 1) - at if told[event, 1] else 0
        new, double, missed, done = store(
            blocks, holders, names, part, hashes[at:end], source, tier, counted, True, hashed > 0
        )
        added += new
        refused += double
        uncounted += missed
        seed[0, 0], seed[0, 1] = keys[done - 1, 0], keys[done - 1, 1]
        at += done
        while event < len(told) and _first_of(told, event + 1) <= at:
            event += 1
        begun = _first_of(told, event)
    cursor[EVENT], cursor[BLOCK] = np.uint64(event), np.uint64(at)
    cursor[2], cursor[3] = seed[0, 0], seed[0, 1]
    return added, refused, uncounted, orphans
