"""How much of a prompt each source holds, for all sources in one walk along its chain.

A walk carries the sources that have held every block so far, as bits, which only go out. Where a block has the same
holders as the one before, nothing goes out and nothing is looked at; so a query costs O(blocks + sources + changes of
holders). Bisection would not do: events remove blocks in the middle of a chain too.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.fleet.base import Source, Tier
from cairn.fleet.blocks import Blocks, find_block
from cairn.fleet.holders import EMPTY, TIERS, Holders, Words
from cairn.index.slots import NONE
from cairn.jit import kernel, trailing_zeros
from cairn.kv import Keys

Counts = npt.NDArray[np.int64]

PLANES = 2 * TIERS - 1
"""What a walk follows at once: each tier by itself, then tiers 0..1, 0..2 and 0..3 together."""

_ONE = np.uint64(1)
_NOBODY = np.uint64(0)


@kernel
def _end(ended: npt.NDArray[np.int32], plane: int, word: int, bits: np.uint64, block: int) -> None:
    """For these sources the plane ends before `block`."""
    while bits:
        ended[plane, 64 * word + trailing_zeros(bits)] = block
        bits &= bits - _ONE


@kernel
def _narrow(holders: Holders, one: int, live: Words, ended: npt.NDArray[np.int32], block: int) -> bool:
    """Puts out who is not in the set; returns whether anybody is left."""
    anybody = _NOBODY
    for word in range(live.shape[1]):
        if not live[PLANES - 1, word]:  # this plane goes out last
            continue
        together = _NOBODY
        for tier in range(TIERS):
            there = holders.rows[one, TIERS * word + tier]
            together |= there
            gone = live[tier, word] & ~there
            if gone:
                _end(ended, tier, word, gone, block)
                live[tier, word] &= there
            if tier:
                plane = TIERS + tier - 1
                gone = live[plane, word] & ~together
                if gone:
                    _end(ended, plane, word, gone, block)
                    live[plane, word] &= together
        anybody |= live[PLANES - 1, word]
    return bool(anybody != _NOBODY)


@kernel
def walk(blocks: Blocks, holders: Holders, keys: Keys, live: Words, ended: npt.NDArray[np.int32]) -> None:
    """`ended[p, s]` = how many leading keys source s holds in plane p; `live` [PLANES, words]: whom to look at.

    Both are used up: `ended` must be len(keys) everywhere. Marks the blocks as used as far as anybody holds them.
    """
    records, table = blocks.records, blocks.table
    last, slot = NONE, NONE
    for i in range(len(keys)):
        slot = find_block(records, table, slot, keys[i, 0], keys[i, 1])
        one = records[slot].holders if slot != NONE else EMPTY
        if one != last:
            if not _narrow(holders, one, live, ended, i):
                return
            last = one
        if not records[slot].used:
            records[slot].used = 1


class Match(NamedTuple):
    """What sources hold of one prompt, in tokens from its start on; rows in the order of `sources`.

    tokens [sources, tiers]: the contiguous prefix that stands in that tier by itself. reach [sources, tiers]: the
    contiguous prefix whose every block stands in that tier or a faster one, so that it grows along a row and
    `reach[:, -1]` is what the source need not compute.
    """

    sources: tuple[Source, ...]
    tokens: Counts
    reach: Counts

    def of(self, source: Source) -> Mapping[Tier, int]:
        """Tokens that one source would take from each tier: each block from the fastest prefix that has it."""
        if source not in self.sources:
            return dict.fromkeys(Tier, 0)
        steps = np.diff(self.reach[self.sources.index(source)], prepend=0)
        return {tier: int(steps[tier]) for tier in Tier}


def planes_of(ended: npt.NDArray[np.int32], ids: npt.NDArray[np.int32], block_tokens: int) -> tuple[Counts, Counts]:
    """`tokens` and `reach` of a Match from what a walk found, for the sources with these ids."""
    found = ended[:, ids].T.astype(np.int64) * block_tokens
    return found[:, :TIERS], found[:, [0, *range(TIERS, PLANES)]]
