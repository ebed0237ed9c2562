"""Bytes moved in pieces: against plain slices and the package xxhash; what is summed is what stands in memory."""

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from cairn.codec.xxh3 import SHORT
from cairn.transport.file_parts import MAPPING, Came, Read, read_files, write_parts
from cairn.transport.moving import PIECE, Checksums, Scatter, gather, scatter, sum_up, sums_of

#: Sizes of parts: nothing, short, and around a unit and a piece.
SIZES = st.lists(
    st.one_of(st.integers(0, SHORT + 1), st.integers(1, 5000), st.integers(PIECE - 2, 2 * PIECE + 2000)), max_size=6
)


@pytest.fixture(scope="module")
def fd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    fd = os.open(tmp_path_factory.mktemp("moving") / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def parts_of(sizes: list[int]) -> list[memoryview]:
    """Parts of these sizes, some aligned as rows are, some not."""
    return [memoryview(mmap.mmap(-1, size + 1))[i % 2 :][:size] for i, size in enumerate(sizes)]


def read(fd: int, offset: int, parts: list[memoryview], sums: np.ndarray) -> int:
    return read_files([Read(f"/proc/self/fd/{fd}", offset, parts, sums)])[0].size


def check(parts: list[memoryview], sums: np.ndarray, data: bytes) -> None:
    """The parts hold the data as far as it goes, zeros behind it, and those that are full and not short are summed."""
    at = 0
    for part, digest in zip(parts, sums, strict=True):
        assert bytes(part) == data[at : at + len(part)].ljust(len(part), b"\0")
        at += len(part)
        full = at <= len(data) and len(part) > SHORT
        assert digest.tobytes() == (xxhash.xxh3_128_digest(part) if full else bytes(16))


@given(SIZES, st.integers(0, 5000), st.integers(-3000, 3000))
def test_reads_equal_slices(fd: int, sizes: list[int], offset: int, longer: int) -> None:
    data, parts = noise(max(0, offset + sum(sizes) + longer)), parts_of(sizes)
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)
    sums = sums_of(parts)
    assert read(fd, offset, parts, sums) == min(sum(sizes), max(0, len(data) - offset))
    check(parts, sums, data[offset:])


@given(SIZES, st.integers(0, 5000))
@example([3000] * 1100, 1)  # more than a call of the system takes
def test_writes_equal_slices(fd: int, sizes: list[int], offset: int) -> None:
    data, at = noise(sum(sizes)), 0
    parts = parts_of(sizes)
    for part in parts:
        part[:] = data[at : at + len(part)]
        at += len(part)
    os.ftruncate(fd, 0)
    write_parts(fd, offset, parts)
    assert os.pread(fd, len(data) + 1, offset) == data
    check(parts, Checksums(parts).make(), data)


@given(SIZES, st.integers(-3000, 3000))
def test_copies_equal_slices(sizes: list[int], longer: int) -> None:
    data, parts = noise(max(0, sum(sizes) + longer)), parts_of(sizes)
    sums = sums_of(parts)
    scatter(memoryview(data), parts, sums)
    check(parts, sums, data)


@given(SIZES, st.integers(-3000, 3000), st.lists(st.integers(0, PIECE + 2000), max_size=20))
@example([3 * PIECE + 5, 300], 0, [1024, 1023, 1, 2047, 3, 1022, PIECE, 1])
def test_copies_of_what_comes_by_pieces_equal_slices(sizes: list[int], longer: int, cuts: list[int]) -> None:
    data, parts = noise(max(0, sum(sizes) + longer)), parts_of(sizes)
    sums, at = sums_of(parts), 0
    target = Scatter(parts, sums)
    for size in [*cuts, len(data)]:
        target.take(data[at : at + size])
        at += size
    check(parts, sums, data)


@given(SIZES, st.integers(-3000, 3000))
def test_gathering_is_the_inverse(sizes: list[int], longer: int) -> None:
    data, parts = noise(sum(sizes)), parts_of(sizes)
    scatter(memoryview(data), parts)
    out, sums = memoryview(mmap.mmap(-1, max(1, sum(sizes) + longer))), sums_of(parts)
    gather(parts, out, sums)
    assert bytes(out) == data[: len(out)].ljust(len(out), b"\0")
    if longer >= 0:
        check(parts, sums, data)


@given(SIZES)
def test_parts_that_something_else_has_filled_are_summed(sizes: list[int]) -> None:
    data, parts = noise(sum(sizes)), parts_of(sizes)
    scatter(memoryview(data), parts)
    sums = sums_of(parts)
    sum_up(parts, sums)
    check(parts, sums, data)


def test_parts_that_were_given_up_are_not_read() -> None:
    """The mapping goes as soon as it is given up: who still read it would take this process down."""
    for _ in range(50):
        memory = mmap.mmap(-1, 8 << 20)
        checksums = Checksums([memoryview(memory)])
        other = threading.Thread(target=checksums.make)
        other.start()
        checksums.drop()
        memory.close()
        other.join()


def test_what_the_system_says_is_raised(fd: int) -> None:
    os.ftruncate(fd, 0)
    for number in (-1, os.open("/dev/null", os.O_RDONLY)):
        with pytest.raises(OSError) as failed:
            write_parts(number, 0, parts_of([1000]))
        assert failed.value.errno == errno.EBADF
    with pytest.raises(OSError) as failed, Path("/dev/full").open("wb") as full:
        write_parts(full.fileno(), 0, parts_of([1000]))
    assert failed.value.errno == errno.ENOSPC


def test_reads_of_many_files_each_say_what_became_of_them(tmp_path: Path) -> None:
    """What cannot be read keeps none of the others from being read, and no file stays open."""
    for name, size in (("first", 1000), ("last", 3000)):
        (tmp_path / name).write_bytes(noise(size))
        os.utime(tmp_path / name, (0, size))
    parts = parts_of([1000, 1000, 1000, 2000, 2000])
    wanted = [("first", parts[:1]), ("absent", parts[1:2]), (".", parts[2:3]), ("last", parts[3:])]
    sums, before = sums_of(parts[3:]), len(list(Path("/proc/self/fd").iterdir()))
    reads = [Read(str(tmp_path / name), 0, some, sums if name == "last" else None) for name, some in wanted]
    came = read_files(reads)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert [came[0], came[3]] == [Came(1000, 1000), Came(3000, 3000)]
    assert [came[1].size, came[2].size] == [-errno.ENOENT, -errno.EISDIR]
    assert bytes(parts[0]) == noise(1000)
    assert [any(part) for part in parts[1:3]] == [False, False]
    check(parts[3:], sums, noise(3000))


def test_reads_do_not_begin_past_the_deadline(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(noise(1000))
    parts = parts_of([1000])
    reads = [Read(str(tmp_path / "file"), 0, parts)] * 2
    assert [size for size, _ in read_files(reads, time.monotonic())] == [-errno.ETIMEDOUT] * 2
    assert not any(parts[0])
    assert [size for size, _ in read_files(reads, time.monotonic() + 60)] == [1000, 1000]


def test_a_file_that_changes_under_the_reader_is_summed_as_it_was_read(fd: int) -> None:
    """A checksum of anything but what stands in the caller's memory would vouch for bytes that he has not got."""
    size, stop = MAPPING + 4 * PIECE, threading.Event()
    contents = [noise(size, seed) for seed in range(2)]
    os.pwrite(fd, contents[0], 0)

    def change() -> None:
        while not stop.is_set():
            for content in contents:
                os.pwrite(fd, content, 0)

    writer = threading.Thread(target=change)
    writer.start()
    try:
        for _ in range(50):
            parts = parts_of([size])
            sums = sums_of(parts)
            assert read(fd, 0, parts, sums) == size
            assert sums[0].tobytes() == xxhash.xxh3_128_digest(parts[0])
    finally:
        stop.set()
        writer.join()


def test_a_file_that_is_cut_short_under_the_reader_is_a_short_read(fd: int) -> None:
    """Large files are mapped while they are read: nothing may come of that but speed."""
    size, stop = 2 * MAPPING, threading.Event()
    content = noise(size)

    def cut() -> None:
        while not stop.is_set():
            os.ftruncate(fd, 0)
            os.pwrite(fd, content, 0)

    writer = threading.Thread(target=cut)
    writer.start()
    try:
        for _ in range(50):
            parts = parts_of([size])
            sums = sums_of(parts)
            came = read(fd, 0, parts, sums)
            assert sums[0].tobytes() == (xxhash.xxh3_128_digest(parts[0]) if came == size else bytes(16))
    finally:
        stop.set()
        writer.join()
