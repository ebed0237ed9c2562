"""From tokens to a chain's keys, with the index's blocks as its memory: (key before, tokens) -> key.

A key costs two BLAKE2s compressions, of which the second waits for the key before: 0.18 us a block (`cairn.kv.keys`).
A fleet computes the same keys over and over: every instance tells of the same system prompt, every query has it, every
turn of a conversation repeats the last. So each block's record keeps a digest of what its key was made of, its *link*,
in 64 bits; where that fits, the key stands beside it. A chain that came at once lies in a row, so the only record that
is looked at is the one behind that of the block before. What comes out is the chain's key, bit for bit.

A link is two strongly universal digests (multilinear, modulo 2**64, the upper half) by numbers drawn for each index
that nobody is told: whatever is asked, another block's link fits with a chance of 2**-63.
"""

import array
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.errors import InputError
from cairn.fleet.base import Stored
from cairn.fleet.blocks import LINKED_TOKENS, Blocks, Chain
from cairn.index.slots import NONE
from cairn.index.table import table_find
from cairn.jit import kernel
from cairn.kv import KeyChain, Keys, as_tokens
from cairn.kv.blake2s import hash_chain, hash_rows, initial_state
from cairn.kv.keys import KEY_BYTES, LEAF_WORDS, Tokens

_INITIALS = np.stack([initial_state(32, b"cairn/lf"), initial_state(16, b"cairn/bk")])

#: Blocks that are hashed in one go at most.
_LONGEST = 64

_ONE, _LOW, _32 = np.uint64(1), np.uint64(0xFFFFFFFF), np.uint64(32)


class Hashed(NamedTuple):
    """A prompt's keys [blocks, 2] in one block size: what `KeyChain.keys` gives."""

    block_tokens: int
    keys: Keys


def root_of(namespace: bytes) -> bytes:
    """What a chain starts from: a namespace digest of 16 bytes itself, any other name's digest."""
    if len(namespace) == KEY_BYTES:
        return namespace
    return hashlib.blake2s(namespace, digest_size=KEY_BYTES, person=b"cairn/fl").digest()


def as_hashed(prompt: Any) -> tuple[Hashed, ...]:
    """What a caller has hashed already, in one block size (a KeyChain) or several (of `FleetIndex.hashed`); or none."""
    if isinstance(prompt, KeyChain):
        return (Hashed(prompt.block_tokens, prompt.keys),)
    if isinstance(prompt, tuple) and prompt and isinstance(prompt[0], Hashed):
        return prompt
    return ()


def seed_of(root: bytes) -> Keys:
    """16 bytes that a chain starts from, as the key before its first block [1, 2]."""
    return np.frombuffer(root, np.uint64).reshape(1, 2).copy()


def rows_of(tokens: Tokens, block_tokens: int) -> Tokens:
    """The whole blocks of tokens [n], [blocks, block_tokens]."""
    blocks = len(tokens) // block_tokens
    return tokens[: blocks * block_tokens].reshape(blocks, block_tokens)


def rows_told(event: Stored) -> Tokens | None:
    """The tokens of an event's blocks [blocks, block_tokens]; None if it contradicts itself."""
    size, blocks = event.block_tokens, len(event.hashes)
    if size < 1 or len(event.tokens) != size * blocks or len(event.extra) not in (0, blocks):
        return None
    try:
        return as_tokens(_token_array(event.tokens)).reshape(blocks, size)
    except (InputError, TypeError, OverflowError):
        return None


def keys_with_extra(root: bytes, rows: Tokens, extra: Sequence[bytes | None]) -> Keys:
    """The keys of blocks [n, tokens] behind `root`, of which some have content beyond the tokens."""
    contents = {i: content for i, content in enumerate(extra) if content is not None}
    return KeyChain(root, rows.shape[1], rows.reshape(-1), contents).keys


def _token_array(tokens: Sequence[int]) -> Any:
    """Three times faster than numpy for lists of ints."""
    return np.frombuffer(array.array("I", tokens), np.uint32) if isinstance(tokens, list | tuple) else tokens


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
def _known(blocks: Blocks, before: Keys, slot: int, rows: Tokens, at: int, chain: Chain) -> int:
    """Goes on from block `at` behind `before` [1, 2] and `slot`, as far as the records in a row have the links; returns
    how many that are, with `before` the key of the last.
    """
    records, seeds, keys, links = blocks.records, blocks.seeds, chain.keys, chain.links
    key0, key1, first = before[0, 0], before[0, 1], at
    while at < len(rows) and slot + 1 < len(records):
        link = _link(seeds, key0, key1, rows, at)
        if not link or records[slot + 1].link != link:
            break
        slot += 1
        key0, key1 = records[slot].key0, records[slot].key1  # right, whoever holds the block
        keys[at, 0], keys[at, 1], links[at] = key0, key1, link
        at += 1
    before[0, 0], before[0, 1] = key0, key1
    return at - first


@kernel
def _hashed(blocks: Blocks, before: Keys, slot: int, rows: Tokens, at: int, stop: int, chain: Chain) -> int:
    """Hashes blocks from `at` to `stop`, and gives those their link that have a record, where they stand in a row from
    the one behind `slot` on. Returns the record of the last, NONE if it has none, with `before` its key.
    """
    records, seeds, keys, links = blocks.records, blocks.seeds, chain.keys, chain.links
    _hash(before, rows[at:stop], keys[at:stop])
    key0, key1 = before[0, 0], before[0, 1]
    for i in range(at, stop):
        links[i] = link = _link(seeds, key0, key1, rows, i)
        key0, key1 = keys[i, 0], keys[i, 1]
        slot += 1
        if slot < len(records) and records[slot].key0 == key0 and records[slot].key1 == key1:
            records[slot].link = link
        else:
            slot = NONE
    before[0, 0], before[0, 1] = key0, key1
    if slot == NONE:
        slot = table_find(blocks.table, records, key0, key1)
        if slot != NONE:
            records[slot].link = links[stop - 1]
    return slot


@kernel
def follow(blocks: Blocks, seed: Keys, slot: int, rows: Tokens, chain: Chain, most: int) -> tuple[int, int]:
    """chain[i] of the blocks rows[i] [tokens] behind `seed` [1, 2], until `most` have been hashed; returns how many
    there are, and how many were hashed. slot: of the block before, if it is known, else NONE.

    Behind a block whose link is not known others are likely to be like it: the more there were, the more are hashed in
    one go.
    """
    before = seed.copy()
    at, run, hashed = 0, 1, 0
    while at < len(rows) and hashed < most:
        known = _known(blocks, before, slot, rows, at, chain)
        if known:
            at, slot, run = at + known, slot + known, 1
            continue
        stop = min(at + run, len(rows), at + most - hashed)
        slot = _hashed(blocks, before, slot, rows, at, stop, chain)
        hashed += stop - at
        at, run = stop, min(2 * run, _LONGEST)
    return at, hashed
