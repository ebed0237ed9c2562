"""Shared files: whose files a sweep takes."""

import os
from pathlib import Path

from cairn.tier.remote import Put
from cairn.tier.remote.files import FileStore
from tests.tier.rig import soon

SIZE = 1 << 20


def test_a_sweep_takes_none_of_the_files_of_others(tmp_path: Path) -> None:
    """A directory that holds more than Cairn's objects, which count alone and go alone."""
    others = [tmp_path / "notes.txt", tmp_path / "data" / "ab" / "abcd", tmp_path / "cairn.old"]
    store = FileStore(tmp_path, capacity_bytes=100 * SIZE, ttl_s=60)  # so much that it does not sweep by itself
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
