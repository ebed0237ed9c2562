"""From tokens to a chain's keys, with the index's blocks as its memory: (key before, tokens) -> key.

A key costs two BLAKE2s compressions, of which the second waits for the key before: 0.18 us a block (`cairn.kv.keys`).
A fleet computes the same keys over and over: every instance tells of the same system prompt, every query has it, every
turn of a conversation repeats the last. So each block's record keeps a digest of what its key was made of, its *link*,
in 64 bits; where that fits, the key stands beside it. A chain that came at once lies in a row, so the only record that
is looked at is the one behind that of the block before. What comes out is the chain's key, bit for bit.

A link is two strongly universal digests (multilinear, modulo 2**64, the upper half) by numbers drawn for each index
that nobody is told: whatever is asked, another block's link fits with a chance of 2**-63.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.fleet.blocks import LINKED_TOKENS, Blocks, Chain
from cairn.index.slots import NONE
from cairn.index.table import table_find
from cairn.jit import kernel
from cairn.kv import Keys
from cairn.kv.blake2s import hash_chain, hash_rows, initial_state
from cairn.kv.keys import LEAF_WORDS, Tokens

_INITIALS = np.stack([initial_state(32, b"cairn/lf"), initial_state(16, b"cairn/bk")])

#: Blocks that are hashed in one go at most.
_LONGEST = 64

_ONE, _LOW, _32 = np.uint64(1), np.uint64(0xFFFFFFFF), np.uint64(32)


class Hashed(NamedTuple):
    """A prompt's keys [blocks, 2] in one block size: what `KeyChain.keys` gives."""

    block_tokens: int
    keys: Keys


@kernel
def _link(seeds: npt.NDArray[np.uint64], before0: np.uint64, before1: np.uint64, rows: Tokens, at: int) -> np.uint64:
    """What the key behind a key is made of, never 0; 0 for blocks that are too long to have a link."""
    size = rows.shape[1]
    if size > LINKED_TOKENS:
        return np.uint64(0)
    first, second = seeds[0, 0], seeds[1, 0]
    for i, word in enumerate((before0 & _LOW, before0 >> _32, before1 & _LOW, before1 >> _32, np.uint64(size))):
        first += seeds[0, 1 + i] * word
        second += seeds[1, 1 + i] * word
    for i in range(size):
        word = np.uint64(rows[at, i])
        first += seeds[0, 6 + i] * word
        second += seeds[1, 6 + i] * word
    return np.uint64((first >> _32) | (second & ~_LOW) | _ONE)


@kernel
def _hash(seed: Keys, rows: Tokens, keys: Keys) -> None:
    """keys[i] of the blocks rows[i] behind `seed` [1, 2], as `KeyChain` has them."""
    leaves = np.empty((len(rows), LEAF_WORDS), np.uint32)
    hash_rows(_INITIALS[0], rows, leaves)
    hash_chain(_INITIALS[1], seed[0].view(np.uint32), leaves, keys.view(np.uint32))


@kernel
def follow(blocks: Blocks, seed: Keys, slot: int, rows: Tokens, chain: Chain, most: int) -> int:
    """chain[i] of the blocks rows[i] [tokens] behind `seed` [1, 2], until `most` have been hashed; returns how many
    that are. slot: of the block before, if it is known, else NONE.

    Behind a block whose link is not known others are likely to be like it: the more there were, the more are hashed in
    one go. What was hashed and has a record gives it its link, where it stands in a row.
    """
    records, seeds, keys, links = blocks.records, blocks.seeds, chain.keys, chain.links
    before = seed.copy()
    at, run, hashed = 0, 1, 0
    while at < len(rows) and hashed < most:
        link = _link(seeds, before[0, 0], before[0, 1], rows, at)
        if link and slot + 1 < len(records) and records[slot + 1].link == link:  # right, whoever holds the block
            slot += 1
            before[0, 0] = keys[at, 0] = records[slot].key0
            before[0, 1] = keys[at, 1] = records[slot].key1
            links[at] = link
            at, run = at + 1, 1
            continue
        stop = min(at + run, len(rows))
        _hash(before, rows[at:stop], keys[at:stop])
        for i in range(at, stop):
            links[i] = _link(seeds, before[0, 0], before[0, 1], rows, i)
            before[0, 0], before[0, 1] = keys[i, 0], keys[i, 1]
            slot = _next(blocks, slot, before, i + 1 == stop)
            if slot != NONE:
                records[slot].link = links[i]
        hashed += stop - at
        at, run = stop, min(2 * run, _LONGEST)
    return at


@kernel
def _next(blocks: Blocks, slot: int, key: Keys, anywhere: bool) -> int:
    """The record of a key [1, 2]: the one behind `slot`, or, if `anywhere`, one that the table has; else NONE."""
    there = slot + 1 < len(blocks.records)
    if there and blocks.records[slot + 1].key0 == key[0, 0] and blocks.records[slot + 1].key1 == key[0, 1]:
        return slot + 1
    return table_find(blocks.table, blocks.records, key[0, 0], key[0, 1]) if anywhere else NONE
