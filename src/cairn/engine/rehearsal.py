"""Compiles what a request would otherwise wait for: a kernel's first call in a new installation takes up to seconds."""

from functools import cache

import numpy as np

from cairn.codec.frame import checksum_of
from cairn.copy import CpuCopier, PagedKV, Progress
from cairn.index import EvictionPolicy, PrefixIndex
from cairn.kv import KeyChain, KVGeometry
from cairn.tier.admission import Sightings

_CAPACITY = 16
#: Requests until every policy has evicted, learned from it, and started over.
_REQUESTS = 400


@cache
def rehearse(policy: type[EvictionPolicy]) -> None:
    """Does once with a small index under `policy` all that an engine does with one. Milliseconds once compiled."""
    chance = np.random.default_rng(0)
    index = PrefixIndex(_CAPACITY, policy)
    journal = index.watch()
    for _ in range(_REQUESTS):
        keys = _chain(int(chance.integers(12)), 1 + int(chance.integers(4)))
        index.match(keys)
        index.unpin(index.pin(keys))
        held = index.touch(keys)
        ids = index.reserve(len(keys) - held)
        index.commit(keys, held, ids)
        journal.silence(journal.changes().slots)
        journal.mention(keys)
    index.remove(_chain(0, 1)[0])
    index.free(index.reserve(1))
    keys = _chain(0, 3)
    roots = np.array([True, False, False])
    PrefixIndex(_CAPACITY, policy).restore(keys, np.roll(keys, 1, axis=0), roots, np.arange(3, dtype=np.int32))
    Sightings(_CAPACITY).sight(keys)
    checksum_of(np.zeros(4096, np.uint8))
    rehearse_copies()


@cache
def _chain(seed: int, blocks: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    """Keys of a short prompt: some hashed at once, some one by one, some with extra content."""
    chain = KeyChain(bytes(16), 2, [seed] * (2 * blocks - 1), {1: b"extra"})
    chain.extend([seed])
    return chain.keys


@cache
def rehearse_copies() -> None:
    """Does once what a CPU copier does. Milliseconds once compiled."""
    geometry = KVGeometry(layers=1, kv_heads=1, head_dim=1, block_tokens=1)
    kv = PagedKV.from_tensors([np.zeros((2, 1, 1, 1, 1), np.uint16)], "nhd", geometry)
    memory, slots, rows = np.zeros((1, 8), np.uint8), np.zeros(1, np.int64), np.zeros(1, np.int32)
    copier = CpuCopier(geometry)
    copier.gather(kv, slots, memory, rows)
    copier.scatter(kv, slots, memory, rows)
    progress = Progress(1)
    copier.scatter_layers(kv, slots, memory, rows, progress)
    progress.wait(1, 0.0)
    progress.stop()
