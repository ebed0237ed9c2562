"""What is read out of an index by others while it changes: right, or known not to be."""

import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.index import LRU, IndexReader, PrefixIndex, Reservation, shared_bytes

from .test_model import Keys, chain_of

CAPACITY = 12
WORDS = 64
#: Reads that must have been right, and those that must have been found not to be, before the storm is believed.
RIGHT, CAUGHT = 2000, 50

paths = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)


class Rows:
    """Memory as an index manages it: each row full of one word of its block's key, or of whatever was there."""

    def __init__(self, memory: npt.NDArray[np.uint8], *, make: bool) -> None:
        size = shared_bytes(CAPACITY)
        self.rows = memory[size:].view(np.uint64).reshape(CAPACITY, WORDS)
        self.reader = IndexReader(memory[:size], CAPACITY)
        if make:
            self.index = PrefixIndex(CAPACITY, LRU, memory[:size])

    @staticmethod
    def bytes() -> int:
        return shared_bytes(CAPACITY) + CAPACITY * WORDS * 8

    def write(self, keys: Keys) -> None:
        writing = Reservation(self.index, keys)
        for i, row in enumerate(writing.rows):
            self.rows[row] = keys[writing.first + i, 1]
            writing.commit(1)
        writing.end()

    def read(self, keys: Keys) -> tuple[npt.NDArray[np.uint64], bool, bool]:
        """The blocks that were found, whether they are to be believed, and whether they are right."""
        noted = self.reader.note(keys)
        read = self.rows[noted.rows].copy()
        believed = self.reader.unchanged(noted)
        return read, believed, bool((read == keys[: len(read), 1:2]).all())


@given(st.lists(st.tuples(st.sampled_from(["write", "remove", "reserve", "note"]), paths), min_size=2, max_size=30))
@settings(deadline=None)
def test_what_is_believed_is_right(steps: list[tuple[str, tuple[int, ...]]]) -> None:
    rows = Rows(np.zeros(Rows.bytes(), np.uint8), make=True)
    index, reader = rows.index, rows.reader
    notes: list[tuple[Keys, object, set[int]]] = []
    given_out: set[int] = set()
    for what, path in steps:
        keys = chain_of(path, collide=len(path) % 2 == 0)
        if what == "note":
            noted = reader.note(keys)
            pinned = index.pin(keys, use=False)
            assert noted.rows.tolist() == pinned.tolist(), "nobody writes meanwhile: what a pin finds"
            index.unpin(pinned)
            assert reader.has(keys) == (len(pinned) == len(keys))
            notes.append((keys, noted, set()))
        elif what == "remove":
            index.remove(keys[-1])
        else:
            writing = Reservation(index, keys)
            given_out = set(writing.rows.tolist())
            for i, row in enumerate(writing.rows):
                rows.rows[row] = keys[writing.first + i, 1]
                if what == "write":
                    writing.commit(1)
            writing.end()
            for _, _, gone in notes:
                gone |= given_out
        for keys_then, noted, gone in notes:
            unchanged = reader.unchanged(noted)  # type: ignore[arg-type]
            assert unchanged == (not gone & set(noted.rows.tolist()))  # type: ignore[attr-defined]
            if unchanged:
                found = rows.rows[noted.rows]  # type: ignore[attr-defined]
                assert (found == keys_then[: len(found), 1:2]).all()


def test_an_index_that_nobody_else_reads_has_no_generations() -> None:
    index = PrefixIndex(4, LRU)
    assert len(index.reserve(4)) == 4
    assert index._generations.size == 0


_WRITER = """
import mmap, sys
import numpy as np
from tests.index.test_shared import Rows, chains
file = open(sys.argv[1], "r+b")
rows = Rows(np.frombuffer(mmap.mmap(file.fileno(), Rows.bytes()), np.uint8), make=True)
rng = np.random.default_rng(0)
print("begun", flush=True)
every = chains()
while True:
    rows.write(every[rng.integers(len(every))])
"""


def chains() -> list[Keys]:
    """More than the rows can hold, some of one beginning."""
    return [chain_of((i % 3, *([i] * (1 + i % 5))), collide=False) for i in range(9)]


def test_another_process_changes_it(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    path.write_bytes(bytes(Rows.bytes()))
    with path.open("r+b") as file:
        rows = Rows(np.frombuffer(mmap.mmap(file.fileno(), Rows.bytes()), np.uint8), make=False)
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, env=environment)
    hung = threading.Timer(60, writer.kill)
    hung.start()
    try:
        assert writer.stdout
        assert writer.stdout.readline()
        right = caught = 0
        while (right < RIGHT or caught < CAUGHT) and writer.poll() is None:
            for keys in chains():
                read, believed, is_right = rows.read(keys)
                assert is_right or not believed, f"wrong bytes after {right} right reads"
                right += believed and len(read) > 0
                caught += not is_right
        assert writer.poll() is None, f"{right} right reads and {caught} wrong ones that were not believed in 60 s"
    finally:
        hung.cancel()
        writer.kill()
        writer.communicate()


@pytest.mark.parametrize("capacity", [1, 5, 100])
def test_arrays_fill_their_memory(capacity: int) -> None:
    memory = np.zeros(shared_bytes(capacity), np.uint8)
    index = PrefixIndex(capacity, LRU, memory)
    keys = chain_of(tuple(range(capacity)), collide=False)
    Reservation(index, keys).commit(capacity)
    assert index.match(keys) == capacity
    assert IndexReader(memory.copy(), capacity).note(keys).rows.tolist() == index.pin(keys).tolist()
