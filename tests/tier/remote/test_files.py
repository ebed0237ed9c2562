"""Shared files: whose files a sweep takes, what stands in an object's place and is none, who sums what is stored."""

import errno
import mmap
import os
import socket
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
from tests.tier.remote.rig import PACK, Place, ask, name_of, opened, raw_get, read, write
from tests.tier.remote.test_conformance import fresh
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


def aged(store: FileStore, root: Path, names: str) -> None:
    """Stores an object of a letter each; the first is the oldest."""
    for age, name in enumerate(names):
        assert store.put([Put(f"cairn/test/{name}".encode(), [memoryview(bytes(SIZE))])], deadline=soon()) == [None]
        os.utime(root / "cairn" / "test" / name / name, (age + 1000, age + 1000))


@pytest.mark.parametrize("limits", [{"capacity_bytes": 3 * SIZE}, {"ttl_s": 60.0}])
def test_a_file_that_cannot_be_removed_keeps_no_other(
    limits: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that NFS keeps for who has it open: EBUSY, and the oldest of all, so that each sweep begins with it."""
    made = FileStore(tmp_path)
    aged(made, tmp_path, "abcdef")
    made.close()
    unlink = Path.unlink

    def stubborn(self: Path, missing_ok: bool = False) -> None:
        if self.name == "a":
            raise OSError(errno.EBUSY, "busy")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", stubborn)
    store = FileStore(tmp_path, **limits)  # type: ignore[arg-type]
    assert store.sweep()
    left = sorted(path.name for path in tmp_path.glob("cairn/test/*/*"))
    assert left == (["a", "f"] if "capacity_bytes" in limits else ["a"])
    assert store.stats()["swept_objects_total"] == 6 - len(left)
    store.close()


def test_directories_may_be_as_deep_as_they_like(tmp_path: Path) -> None:
    deep = [str(tmp_path / "cairn") + "/d" * depth for depth in range(1200)]
    for directory in deep:
        os.mkdir(directory)  # noqa: PTH102 - pathlib makes and removes deep ones by recursion
    store = FileStore(tmp_path, ttl_s=60)
    aged(store, tmp_path, "a")
    assert store.sweep()
    assert store.stats()["swept_objects_total"] == 1
    store.close()
    for directory in deep[:0:-1]:
        os.rmdir(directory)  # noqa: PTH106


@pytest.mark.parametrize("kind", ["pipe", "socket", "directory"])
def test_what_is_no_file_is_foreign_and_keeps_nobody(kind: str, tmp_path: Path) -> None:
    """Opening a pipe waits for who writes to it, for ever, unless one says that one will not wait."""
    keys = fresh(PACK)
    with opened(Place(f"file://{tmp_path}", "files")) as tier:
        assert set(write(tier, keys)) == {None}
        (path,) = tmp_path.rglob(name_of(tier, keys).rpartition(b"/")[2].decode())
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        else:
            here = os.open(path.parent, os.O_RDONLY)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(f"/proc/self/fd/{here}/{path.name}")
            os.close(here)
        assert set(read(tier, keys, timeout=5)) == {Reason.FOREIGN}
        assert tier.match(keys) == 0
        if kind != "directory":
            assert set(write(tier, keys)) == {None}
            assert ask(tier, keys) == PACK
            assert set(read(tier, keys)) == {None}


def test_a_file_in_the_place_of_a_directory_is_foreign_and_closes_the_path_to_nobody(tmp_path: Path) -> None:
    """One of 256 directories can hold nothing; the others are as they were."""
    place, keys, others = Place(f"file://{tmp_path}", "files"), fresh(PACK), fresh(PACK)
    with opened(place) as tier:
        while name_of(tier, others)[-32:-30] == name_of(tier, keys)[-32:-30]:
            others = fresh(PACK)
        assert set(write(tier, keys)) == {None}
        (path,) = tmp_path.rglob(name_of(tier, keys).rpartition(b"/")[2].decode())
        path.unlink()
        path.parent.rmdir()
        path.parent.write_text("a file")
        for _ in range(5):  # more than open a breaker
            assert set(read(tier, keys)) <= {Reason.FOREIGN, Reason.EVICTED}
            assert set(write(tier, keys)) == {Reason.FOREIGN}
            assert ask(tier, keys) == 0
        assert tier.stats()["breaker_opened_total"] == 0
        assert set(write(tier, others)) == {None}
        assert set(read(tier, others)) == {None}
        assert path.parent.read_text() == "a file"


def test_who_gets_no_answer_does_not_take_an_object_for_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a soft NFS mount whose server is away."""
    store, names = FileStore(tmp_path), [b"cairn/test/1"]

    def away(*_: object) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "no answer")

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", away)
        assert store.exists(names, deadline=soon()) is Reason.TIMEOUT
    assert store.exists(names, deadline=soon()) == [False]
    store.close()


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


def summed(memory: mmap.mmap, name: bytes) -> Put:
    """An object of two blocks whose tail is their checksums."""

    def tail(sums: Octets) -> memoryview:
        return memoryview(sums.tobytes())

    return Put(name, [memoryview(memory)[:SIZE], memoryview(memory)[SIZE:]], tail, 32)


def test_a_store_waits_for_no_summing_thread_that_comes_late(late: FileStore) -> None:
    memory, names = mmap.mmap(-1, 2 * SIZE), [b"cairn/test/1", b"cairn/test/2"]
    memory[:] = np.random.default_rng(0).integers(0, 256, 2 * SIZE, np.uint8).tobytes()
    assert late.put([summed(memory, name) for name in names], deadline=soon()) == [None, None]
    sums = [xxhash.xxh3_128_digest(memory[at : at + SIZE]) for at in (0, SIZE)]
    for name in names:
        assert raw_get(late, name, 2 * SIZE + 32) == memory[:] + b"".join(sums)
    memory.close()


def test_after_the_deadline_nobody_reads_the_memory(late: FileStore) -> None:
    memory = mmap.mmap(-1, 2 * SIZE)
    past = time.monotonic() - 1
    assert late.put([summed(memory, b"cairn/test/late")], deadline=past) == [Reason.TIMEOUT]
    memory.close()  # raises while anybody holds it
