"""Many plain events at once: each hashed behind its parent, and stored, in one kernel.

Events that follow one another in a chain are taken as one, up to a name that is not taken: an event behind such a block
has no parent then, as if it had come by itself.
"""

import numpy as np
import numpy.typing as npt

from cairn.fleet.blocks import Blocks, Chain, store
from cairn.fleet.holders import Holders
from cairn.fleet.links import follow
from cairn.fleet.names import Hashes, Names, find_name, slot_at
from cairn.index.slots import NONE
from cairn.jit import kernel
from cairn.kv import Keys
from cairn.kv.keys import Tokens

#: Where a cursor stands: in which event, at which block; the last two: the key of the block before, if inside an event.
EVENT, BLOCK = 0, 1
CURSOR_WORDS = 4


@kernel
def _first_of(told: npt.NDArray[np.uint64], event: int) -> int:
    """Its first block; also behind the last event."""
    return int(np.int64(told[event - 1, 2])) if event else 0


@kernel
def _end_of_chain(hashes: Hashes, told: npt.NDArray[np.uint64], event: int, stop: int) -> int:
    """Where the chain of events ends that begins with `event`, each behind the one before; `stop` at the latest."""
    end = _first_of(told, event + 1)
    while end < stop:
        event += 1
        if told[event, 1] or told[event, 0] != hashes[end - 1]:
            return end
        end = _first_of(told, event + 1)
    return min(end, stop)


@kernel
def store_many(
    blocks: Blocks,
    holders: Holders,
    names: Names,
    root: Keys,
    rows: Tokens,
    hashes: Hashes,
    told: npt.NDArray[np.uint64],
    cursor: npt.NDArray[np.uint64],
    most: int,
    source: int,
    tier: int,
    copies: bool,
) -> tuple[int, int, int, int]:
    """Goes on from `cursor` for at most `most` blocks, as `store` does, which says what there must be room for.

    rows [blocks, tokens]: of all blocks; told: see `StoredMany`; root [1, 2]: the key before a prompt's first block. An
    event whose parent `source` does not hold by then is left out. copies: blocks of events with a parent that are held
    already are further copies. Returns how many names are new, how many not taken, how many copies not counted, and how
    many blocks were left out.
    """
    added, refused, uncounted, orphans = 0, 0, 0, 0
    event, at = int(np.int64(cursor[EVENT])), int(np.int64(cursor[BLOCK]))
    begun = _first_of(told, event)
    stop = min(len(hashes), at + most)
    keys, links = np.empty((most, 2), np.uint64), np.empty(most, np.uint64)
    seed = np.empty((1, 2), np.uint64)
    seed[0, :] = cursor[2:]
    while at < stop:
        slot = NONE
        if at == begun:
            if told[event, 1]:
                seed[0, :] = root[0]
            else:
                name = find_name(names, told[event, 0])
                if name == NONE:
                    event += 1
                    begun = _first_of(told, event)
                    orphans += begun - at
                    at = begun
                    continue
                slot = slot_at(names, name)
                seed[0, 0] = blocks.records[slot].key0
                seed[0, 1] = blocks.records[slot].key1
        end = _end_of_chain(hashes, told, event, stop)
        part, count = Chain(keys[: end - at], links[: end - at]), end - at
        follow(blocks, seed, slot, rows[at:end], part, count)
        counted = count
        if copies:
            counted = _first_of(told, event + 1) - at if told[event, 1] else 0
        new, double, missed, done = store(blocks, holders, names, part, hashes[at:end], source, tier, counted, True)
        added += new
        refused += double
        uncounted += missed
        seed[0, :] = keys[done - 1]
        at += done
        while event < len(told) and _first_of(told, event + 1) <= at:
            event += 1
        begun = _first_of(told, event)
    cursor[EVENT], cursor[BLOCK] = np.uint64(event), np.uint64(at)
    cursor[2:] = seed[0]
    return added, refused, uncounted, orphans
