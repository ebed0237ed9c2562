"""Block keys: a chain of 16-byte BLAKE2s digests over the blocks of a prompt.

    leaf[i] = BLAKE2s-256(tokens of block i as little-endian u32)              person "cairn/lf"
    key[i]  = BLAKE2s-128(key[i-1] || leaf[i])                                 person "cairn/bk", key[-1] = namespace
    key[i]  = BLAKE2s-128(key[i-1] || leaf[i] || extra digest)                 the same, for a block with extra content

A chunk that may stand anywhere in a prompt (blending) has the same chain from another root:

    key[-1] = BLAKE2s-128(namespace || how its positions are encoded)          person "cairn/ck"

Same tokens, same namespace: same key in every process, on every machine, whatever PYTHONHASHSEED. The leaf level exists
because leaves do not depend on one another; only the short second level is a chain.
"""

import hashlib
from array import array
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cairn.errors import InputError
from cairn.kv.blake2s import hash_chain, hash_rows, initial_state

#: Keys of a chain: uint64 [n, 2], row i the 16 bytes of key i.
Keys = npt.NDArray[np.uint64]
Tokens = npt.NDArray[np.uint32]

KEY_BYTES = 16
LEAF_WORDS = 8

_LEAF = initial_state(32, b"cairn/lf")
_BLOCK = initial_state(16, b"cairn/bk")


def as_tokens(tokens: Any) -> Tokens:
    """Token ids as a contiguous uint32 array [n]; takes arrays, torch tensors on the CPU and sequences of ints.

    Raises InputError when they are not one-dimensional integers in [0, 2**32).
    """
    if isinstance(tokens, list):
        with suppress(TypeError, OverflowError):  # said below
            return np.array(array("I", tokens), np.uint32)  # a list by itself takes numpy four times as long
    try:
        given = np.asarray(tokens)
    except ValueError:
        raise InputError("token ids in rows of different lengths: must be one row of integers") from None
    if given.size == 0:
        return np.zeros(0, np.uint32)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise InputError(f"token ids of shape {given.shape} and dtype {given.dtype}: must be one row of integers")
    if given.dtype != np.uint32:
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= 1 << 32:
            raise InputError(f"token id {low if low < 0 else high}: must be in [0, 2**32)")
    return np.ascontiguousarray(given, np.uint32)


def leaf_digests(tokens: Tokens, block_tokens: int) -> npt.NDArray[np.uint32]:
    """Digests [blocks, 8 words] of the whole blocks of `tokens`; a partial block at the end is left out."""
    rows = tokens[: len(tokens) // block_tokens * block_tokens].reshape(-1, block_tokens)
    digests = np.empty((len(rows), LEAF_WORDS), np.uint32)
    hash_rows(_LEAF, rows, digests)
    return digests


def chunk_root(namespace: bytes, positions: bytes) -> bytes:
    """What the chains of position-free chunks begin with, in place of a namespace, which it can never equal.

    positions: a digest of everything that positions do to a key vector, since a chunk's keys are turned to others.
    """
    return hashlib.blake2s(namespace + positions, digest_size=KEY_BYTES, person=b"cairn/ck").digest()


class KeyChain:
    """The keys of one request: computed once, extended as tokens come, never computed again.

    `extra` names content beyond the token ids, by block: `{block: bytes}` (multimodal ids, prompt embeddings, ...);
    such a block, and so every block after it, matches only the same content.

    Owned by one request; not thread-safe while it is extended. Raises InputError for tokens that are no token ids, and
    for extra content that is no bytes.
    """

    def __init__(
        self, namespace: bytes, block_tokens: int, tokens: Any = (), extra: Mapping[int, bytes] | None = None
    ) -> None:
        self.namespace = namespace
        self.block_tokens = block_tokens
        self._extra = {block: _extra_digest(block, content) for block, content in (extra or {}).items()}
        self._keys: Keys = np.empty((64, 2), np.uint64)
        self._blocks = 0
        self._tail: Tokens = np.zeros(0, np.uint32)
        self.extend(tokens)

    def __len__(self) -> int:
        """Whole blocks so far."""
        return self._blocks

    @property
    def tokens(self) -> int:
        """Tokens so far, those of the unfinished block included."""
        return self._blocks * self.block_tokens + len(self._tail)

    @property
    def keys(self) -> Keys:
        """The keys so far, uint64 [blocks, 2]; a view that later `extend` calls may leave behind."""
        return self._keys[: self._blocks]

    def key(self, block: int) -> bytes:
        """The 16 bytes of one block's key."""
        return bytes(self.keys[block])

    def extend(self, tokens: Any) -> None:
        """Appends tokens [n]; costs O(n), whatever the chain's length."""
        new = as_tokens(tokens)
        if len(self._tail):
            new = np.concatenate([self._tail, new])
        blocks = len(new) // self.block_tokens
        self._tail = new[blocks * self.block_tokens :].copy()
        if blocks:
            self._append(leaf_digests(new, self.block_tokens))

    def _append(self, leaves: npt.NDArray[np.uint32]) -> None:
        start, stop = self._blocks, self._blocks + len(leaves)
        if stop > len(self._keys):
            grown = np.empty((stop + stop // 4 + 64, 2), np.uint64)
            grown[:start] = self._keys[:start]
            self._keys = grown
        self._blocks = stop
        # Runs of plain blocks hash in one call; a block with extra content is a run of its own, with a longer link.
        cuts = sorted({start, stop, *(c for b in self._extra if start <= b < stop for c in (b, b + 1))})
        for first, last in pairwise(cuts):
            links = leaves[first - start : last - start]
            if first in self._extra:
                links = np.concatenate([links[0], np.frombuffer(self._extra[first], np.uint32)])[None]
            # Writable as the others are: the kernel would be compiled once more for one that is not.
            seed = self._keys[first - 1] if first else np.frombuffer(bytearray(self.namespace), np.uint64)
            hash_chain(_BLOCK, seed.view(np.uint32), links, self._keys[first:last].view(np.uint32))


def _extra_digest(block: int, content: Any) -> bytes:
    try:
        return hashlib.blake2s(content, digest_size=KEY_BYTES, person=b"cairn/ex").digest()
    except TypeError:
        raise InputError(f"extra[{block}] is {type(content).__name__}: must be bytes that name the content") from None
