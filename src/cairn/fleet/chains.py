"""From what events and callers say to keys and names: the hashing side of the index."""

import array
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cairn.errors import InputError
from cairn.fleet.base import Stored
from cairn.fleet.links import Hashed
from cairn.fleet.names import Hashes
from cairn.kv import KeyChain, Keys, as_tokens
from cairn.kv.keys import KEY_BYTES, Tokens

#: What an engine calls a block.
EngineHash = bytes | int

_MASK = (1 << 64) - 1
_SHORTEST = 8


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


def hashes_of(hashes: Sequence[EngineHash]) -> Hashes | None:
    """Names [n] for a source's own table: 64 bits of each hash, the last ones as vLLM shortens it; None: no hashes."""
    try:
        return _words(hashes)
    except TypeError:
        return None


def _words(hashes: Sequence[EngineHash]) -> Hashes:
    kinds = set(map(type, hashes))
    if kinds == {int}:
        try:
            return np.array(hashes, np.uint64)
        except OverflowError:  # signed, or of more than 64 bits
            return np.array([one & _MASK for one in hashes], np.uint64)  # type: ignore[operator]
    if kinds == {bytes}:
        lengths = set(map(len, hashes))  # type: ignore[arg-type]
        if len(lengths) == 1 and (length := lengths.pop()) >= _SHORTEST:
            rows = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, length)  # type: ignore[arg-type]
            return np.ascontiguousarray(rows[:, -8:]).view(">u8").reshape(-1).astype(np.uint64)
    return np.array([_word(one) for one in hashes], np.uint64)


def hash_of(one: EngineHash) -> np.uint64:
    """The name of one block, as in `hashes_of`. Raises TypeError for what is no hash."""
    return np.uint64(_word(one))


def _word(one: EngineHash) -> int:
    return int.from_bytes(one[-8:], "big") if isinstance(one, bytes) else one & _MASK


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
