"""What the tier tests share: tiny blocks whose bytes follow from their key, and a tier to put them into."""

import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cairn.kv import KeyChain, Keys, KVGeometry, Namespace
from cairn.tier.base import Outcomes, Rows
from cairn.tier.disk import DiskTier

#: 4 KiB a block, so that a slot is 8 KiB; and one whose 2,560 bytes leave padding in the slot.
GEOMETRY = KVGeometry(layers=1, kv_heads=1, head_dim=64, dtype="float16", block_tokens=16)
PADDED = KVGeometry(layers=1, kv_heads=1, head_dim=40, dtype="float16", block_tokens=16)
SLOT_BYTES = 8192
PAGE = 4096

_PATTERN = np.random.default_rng(7).integers(0, 256, PAGE, np.uint8)


def capacity(slots: int) -> int:
    """Bytes for exactly this many slots."""
    return 17 * PAGE + slots * (SLOT_BYTES + 128)


def namespace(salt: bytes = b"", geometry: KVGeometry = GEOMETRY) -> bytes:
    return Namespace(model="test", geometry=geometry, salt=salt).digest()


def prompt(number: int, blocks: int, salt: bytes = b"") -> Keys:
    """The keys of a prompt that shares nothing with another number's."""
    tokens = np.arange(blocks * 16, dtype=np.uint32)
    tokens[0] = 1_000_000 + number
    return KeyChain(namespace(salt), 16, tokens).keys


def content(key: Keys, geometry: KVGeometry = GEOMETRY) -> npt.NDArray[np.uint8]:
    """The bytes that belong to a key [2]."""
    words: npt.NDArray[np.uint8] = np.tile(np.ascontiguousarray(key).view(np.uint8), PAGE // 16) ^ _PATTERN
    return words[: geometry.block_bytes]


def memory(rows: int) -> npt.NDArray[np.uint8]:
    """Page-aligned rows of one page."""
    return np.frombuffer(mmap.mmap(-1, max(1, rows) * PAGE), np.uint8).reshape(-1, PAGE)[:rows]


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


def filled(keys: Keys, geometry: KVGeometry = GEOMETRY) -> Rows:
    """Rows with the contents of these keys."""
    rows = memory(len(keys))
    for row, key in zip(rows, keys, strict=True):
        row[: geometry.block_bytes] = content(key, geometry)
    return Rows(rows, np.arange(len(keys), dtype=np.int32))


def put(tier: DiskTier, keys: Keys, first: int = 0, salt: bytes = b"") -> Outcomes:
    """Writes the blocks from `first` on and waits."""
    rows = filled(keys[first:], tier.geometry)
    return tier.write(keys, first, rows, namespace=namespace(salt, tier.geometry), deadline=soon()).result(60)


def get(tier: DiskTier, keys: Keys, first: int = 0) -> Outcomes:
    """Reads the blocks from `first` on and waits; whatever is said to be read must be right."""
    rows = Rows(memory(len(keys) - first), np.arange(len(keys) - first, dtype=np.int32))
    outcomes = tier.read(keys, first, rows, deadline=soon()).result(60)
    for key, row, outcome in zip(keys[first:], rows.memory, outcomes, strict=True):
        if outcome is None:
            assert np.array_equal(row[: tier.geometry.block_bytes], content(key, tier.geometry)), (
                "wrong bytes were served"
            )
    return outcomes


@contextmanager
def opened(path: Path, slots: int = 32, geometry: KVGeometry = GEOMETRY, **options: Any) -> Iterator[DiskTier]:
    tier = DiskTier(path, geometry=geometry, capacity_bytes=capacity(slots), **{"threads": 2, **options})
    try:
        yield tier
    finally:
        tier.close(30)
