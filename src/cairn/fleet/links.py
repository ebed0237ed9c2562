"""The second level of `cairn.kv.KeyChain`'s hashing, with the index's blocks as its memory: (key before, leaf) -> key.

A link of the chain waits for the one before, so it costs a whole BLAKE2s compression, 0.15 us a block, five times what
the leaf costs that is hashed beside fifteen others. A fleet computes the same links over and over: every instance tells
of the same system prompt, every query has it, every turn of a conversation repeats the last. So each block's record
keeps a digest of what its key was made of, in 64 bits, and where that fits, the key stands beside it. A chain that came
at once lies in a row: the only record that is looked at is the one behind that of the block before. What comes out is
the chain's key, bit for bit.

The digest is strongly universal (multilinear, modulo 2**128, the upper half), by numbers drawn for each index that
nobody is told: whatever is asked, another link fits with a chance of 2**-63.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types

from cairn.fleet.blocks import Blocks, Chain
from cairn.index.slots import NONE
from cairn.index.table import table_find
from cairn.jit import intrinsic, kernel
from cairn.kv import Keys
from cairn.kv.blake2s import hash_chain, hash_rows, initial_state
from cairn.kv.keys import LEAF_WORDS, Tokens

_INITIALS = np.stack([initial_state(32, b"cairn/lf"), initial_state(16, b"cairn/bk")])
_LONGEST = 64

Leaves = npt.NDArray[np.uint64]


class Hashed(NamedTuple):
    """A prompt's keys [blocks, 2] in one block size: what `KeyChain.keys` gives."""

    block_tokens: int
    keys: Keys


def leaves_of(rows: Tokens) -> Leaves:
    """The first level of the hashing, which waits for nothing: leaves [n, 4] of blocks [n, tokens]."""
    leaves = np.empty((len(rows), LEAF_WORDS), np.uint32)
    hash_rows(_INITIALS[0], rows, leaves)
    return leaves.view(np.uint64)


def _sum_of_products(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
    """Codegen: the upper half of s0 + s1 * a + s2 * b + ..., with s of 128 bits each, in a row at an address."""
    wide, address = ir.IntType(128), arguments[0]
    factors = []
    for i in range(len(arguments)):
        place = builder.add(address, ir.Constant(ir.IntType(64), 16 * i))
        factors.append(builder.load(builder.inttoptr(place, wide.as_pointer()), align=8))
    total = factors[0]
    for factor, word in zip(factors[1:], arguments[1:], strict=True):
        total = builder.add(total, builder.mul(factor, builder.zext(word, wide)))
    return builder.trunc(builder.lshr(total, ir.Constant(wide, 64)), ir.IntType(64))


@intrinsic
def _digest(typingctx: Any, seeds: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    word = types.uint64
    return word(types.int64, word, word, word, word), _sum_of_products


@kernel
def _link(seeds: npt.NDArray[np.uint64], before0: np.uint64, before1: np.uint64, leaf: Leaves) -> np.uint64:
    """What a key is made of, never 0. 128 bits of the leaf, as of the key."""
    digest = _digest(np.int64(seeds.ctypes.data), before0, before1, leaf[0], leaf[1])
    return np.uint64(digest | np.uint64(1))


@kernel
def follow(blocks: Blocks, seed: Keys, slot: int, leaves: Leaves, chain: Chain, most: int) -> int:
    """chain[i] of the blocks with leaves[i] [4] behind `seed` [1, 2], until `most` have been hashed; returns how many
    that are. slot: of the block before, if it is known, else NONE.

    Behind a block that has no record none is likely to have one: the more had none, the more are hashed in one go.
    """
    records, seeds, keys, links = blocks.records, blocks.seeds, chain.keys, chain.links
    before0, before1 = seed[0, 0], seed[0, 1]
    scratch = np.empty((1, 2), np.uint64)
    at, run, hashed = 0, 1, 0
    while at < len(leaves) and hashed < most:
        link = _link(seeds, before0, before1, leaves[at])
        if slot + 1 < len(records) and records[slot + 1].link == link:  # the key is right whoever holds the block
            slot += 1
            before0, before1 = records[slot].key0, records[slot].key1
            keys[at, 0] = before0
            keys[at, 1] = before1
            links[at] = link
            at, run = at + 1, 1
            continue
        stop = min(at + run, len(leaves))
        scratch[0, 0] = before0
        scratch[0, 1] = before1
        part = keys[at:stop]
        hash_chain(_INITIALS[1], scratch[0].view(np.uint32), leaves[at:stop].view(np.uint32), part.view(np.uint32))
        for i in range(at, stop):
            links[i] = _link(seeds, before0, before1, leaves[i])
            before0, before1 = keys[i, 0], keys[i, 1]
        slot = table_find(blocks.table, records, before0, before1)
        if slot != NONE:
            records[slot].link = links[stop - 1]  # one that a snapshot brought does not know it yet
        hashed += stop - at
        at, run = stop, 1 if slot != NONE else min(2 * run, _LONGEST)
    return at
