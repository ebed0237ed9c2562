"""Shared files: who sums what is stored, and when nobody does any more."""

import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from cairn.codec.base import Octets
from cairn.observe.reasons import Reason
from cairn.tier.remote import Put
from cairn.tier.remote.files import FileStore
from tests.tier.remote.rig import raw_get
from tests.tier.rig import soon

SIZE = 1 << 20


@pytest.fixture
def late(tmp_path: Path) -> Iterator[FileStore]:
    """A store whose summing thread comes to nothing before the test is over."""
    store, over, busy = FileStore(tmp_path / "shared"), threading.Event(), threading.Event()

    def hold() -> None:
        busy.set()
        over.wait()

    store._summer.submit(hold, urgent=True)
    assert busy.wait(60)
    yield store
    over.set()
    store.close()


def put(memory: mmap.mmap, name: bytes) -> Put:
    def tail(sums: Octets) -> memoryview:
        return memoryview(sums.tobytes())

    return Put(name, [memoryview(memory)[:SIZE], memoryview(memory)[SIZE:]], tail, 32)


def test_a_store_waits_for_no_thread_that_comes_late(late: FileStore) -> None:
    memory, names = mmap.mmap(-1, 2 * SIZE), [b"cairn/test/1", b"cairn/test/2"]
    memory[:] = np.random.default_rng(0).integers(0, 256, 2 * SIZE, np.uint8).tobytes()
    assert late.put([put(memory, name) for name in names], deadline=soon()) == [None, None]
    sums = [xxhash.xxh3_128_digest(memory[at : at + SIZE]) for at in (0, SIZE)]
    for name in names:
        assert raw_get(late, name, 2 * SIZE + 32) == memory[:] + b"".join(sums)
    memory.close()


def test_after_the_deadline_nobody_reads_the_memory(late: FileStore) -> None:
    memory = mmap.mmap(-1, 2 * SIZE)
    past = time.monotonic() - 1
    assert late.put([put(memory, b"cairn/test/late")], deadline=past) == [Reason.TIMEOUT]
    memory.close()  # raises while anybody holds it


def test_a_sweep_takes_none_of_the_files_of_others(tmp_path: Path) -> None:
    """A directory that holds more than Cairn's objects, which count alone and go alone."""
    others = [tmp_path / "notes.txt", tmp_path / "data" / "ab" / "abcd", tmp_path / "cairn.old"]
    store = FileStore(tmp_path, capacity_bytes=2 * SIZE, ttl_s=60)
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(SIZE))
    for name in (b"cairn/test/old", b"cairn/test/new"):
        assert store.put([Put(name, [memoryview(bytes(SIZE))])], deadline=soon()) == [None]
    for path in (*others, *tmp_path.glob("cairn/test/*/old")):
        os.utime(path, (0, 0))
    assert store.sweep()
    assert all(path.exists() for path in others)
    assert store.exists([b"cairn/test/old", b"cairn/test/new"], deadline=soon()) == [False, True]
    assert store.stats() == {"swept_objects_total": 1, "resident_bytes": SIZE}
    store.close()
