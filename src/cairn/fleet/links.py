"""The second level of `cairn.kv.KeyChain`'s hashing, with a memory: (key before, leaf) -> key.

A link of the chain waits for the one before, so it costs a whole BLAKE2s compression, 0.15 us a block, five times what
the leaf costs that is hashed beside fifteen others. A fleet computes the same links over and over: every instance tells
of the same system prompt, every query has it, every turn of a conversation repeats the last. The memory has a
fixed size, compares 128 bits of the key and of the leaf, and forgets by overwriting. What comes out is the chain's key,
bit for bit.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.errors import InputError
from cairn.index.slots import NONE
from cairn.jit import kernel
from cairn.kv import Keys, as_tokens
from cairn.kv.blake2s import Words, hash_chain, hash_rows, initial_state
from cairn.kv.keys import LEAF_WORDS, Tokens

_LINK = np.dtype([(name, np.uint64) for name in ("before0", "before1", "leaf0", "leaf1", "key0", "key1")])
_INITIALS = np.stack([initial_state(32, b"cairn/lf"), initial_state(16, b"cairn/bk")])
_WAYS = 4
_LONGEST = 64
_NO_LINKS = np.empty(0, _LINK)
_NOTHING = np.uint64(0)


class Hashed(NamedTuple):
    """A prompt's keys [blocks, 2] in one block size: what `KeyChain.keys` gives."""

    block_tokens: int
    keys: Keys


@kernel
def _find(links: npt.NDArray[np.void], before0: np.uint64, before1: np.uint64, leaf: npt.NDArray[np.uint64]) -> int:
    """Where the link stands, or NONE."""
    first = _first(links, before0, leaf)
    for at in range(first, first + _WAYS):
        same = links[at].leaf0 == leaf[0] and links[at].leaf1 == leaf[1]
        if same and links[at].before0 == before0 and links[at].before1 == before1:
            return at
    return NONE


@kernel
def _first(links: npt.NDArray[np.void], before0: np.uint64, leaf: npt.NDArray[np.uint64]) -> int:
    mask = np.uint64(len(links) // _WAYS - 1)
    return int(np.int64((before0 ^ leaf[0]) & mask)) * _WAYS


@kernel
def _remember(
    links: npt.NDArray[np.void], before0: np.uint64, before1: np.uint64, leaf: npt.NDArray[np.uint64], key: Keys
) -> None:
    """Where all places are taken any goes: the oldest would go round and round."""
    first = _first(links, before0, leaf)
    place = first + int(np.int64(key[0]) & (_WAYS - 1))
    for at in range(first, first + _WAYS):
        if links[at].leaf0 == _NOTHING and links[at].leaf1 == _NOTHING:
            place = at
    links[place].before0 = before0
    links[place].before1 = before1
    links[place].leaf0 = leaf[0]
    links[place].leaf1 = leaf[1]
    links[place].key0 = key[0]
    links[place].key1 = key[1]


@kernel
def _chain(links: npt.NDArray[np.void], initial: Words, seed: Keys, leaves: npt.NDArray[np.uint64], keys: Keys) -> None:
    """keys[i] from keys[i-1] (first: seed [1, 2]) and leaves[i] [4], remembered where possible.

    Behind a link that is new, all are likely to be: the more were, the more are hashed in one go.
    """
    before0, before1 = seed[0, 0], seed[0, 1]
    scratch = np.empty((1, 2), np.uint64)
    at, run = 0, 1
    while at < len(leaves):
        found = _find(links, before0, before1, leaves[at])
        if found != NONE:
            before0, before1 = links[found].key0, links[found].key1
            keys[at, 0] = before0
            keys[at, 1] = before1
            at, run = at + 1, 1
            continue
        stop = min(at + run, len(leaves))
        scratch[0, 0] = before0
        scratch[0, 1] = before1
        part = keys[at:stop]
        hash_chain(initial, scratch[0].view(np.uint32), leaves[at:stop].view(np.uint32), part.view(np.uint32))
        for i in range(at, stop):
            _remember(links, before0, before1, leaves[i], keys[i])
            before0, before1 = keys[i, 0], keys[i, 1]
        at, run = stop, min(2 * run, _LONGEST)


@kernel
def chain(links: npt.NDArray[np.void], seed: Keys, leaves: npt.NDArray[np.uint64], keys: Keys) -> None:
    """keys[i] of the blocks with leaves[i] [4], behind `seed` [1, 2]; without links, no memory."""
    if len(links):
        _chain(links, _INITIALS[1], seed, leaves, keys)
    else:
        hash_chain(_INITIALS[1], seed[0].view(np.uint32), leaves.view(np.uint32), keys.view(np.uint32))


@kernel
def _keys(links: npt.NDArray[np.void], seed: Keys, rows: Tokens, keys: Keys) -> None:
    """keys[i] of the blocks rows[i] [tokens], behind `seed` [1, 2]."""
    leaves = np.empty((len(rows), LEAF_WORDS), np.uint32)
    hash_rows(_INITIALS[0], rows, leaves)
    chain(links, seed, leaves.view(np.uint64), keys)


def leaves_of(rows: Tokens) -> npt.NDArray[np.uint64]:
    """The first level of the hashing, which waits for nothing: leaves [n, 4] of blocks [n, tokens]."""
    leaves = np.empty((len(rows), LEAF_WORDS), np.uint32)
    hash_rows(_INITIALS[0], rows, leaves)
    return leaves.view(np.uint64)


class Links:
    """A memory of `room` links (a power of two), 48 bytes each. Thread-safe: who finds it in use hashes without it."""

    def __init__(self, room: int) -> None:
        self._links = np.zeros(room, _LINK)
        self._busy = threading.Lock()

    @property
    def nbytes(self) -> int:
        return self._links.nbytes

    def hashed(self, root: bytes, block_tokens: int, tokens: Any) -> Hashed:
        """The keys of the whole blocks of `tokens` [n] after `root` (16 bytes). Raises InputError as KeyChain does."""
        if block_tokens < 1:
            raise InputError(f"block_tokens={block_tokens}: must be at least 1")
        ids = as_tokens(tokens)
        blocks = len(ids) // block_tokens
        rows = ids[: blocks * block_tokens].reshape(blocks, block_tokens)
        seed = np.array(np.frombuffer(root, np.uint64)).reshape(1, 2)
        keys = np.empty((blocks, 2), np.uint64)
        with self.lent() as links:
            _keys(links, seed, rows, keys)
        return Hashed(block_tokens, keys)

    @contextmanager
    def lent(self) -> Iterator[npt.NDArray[np.void]]:
        """The memory, for `chain`; or none, if it is in use."""
        if not self._busy.acquire(blocking=False):
            yield _NO_LINKS
            return
        try:
            yield self._links
        finally:
            self._busy.release()
