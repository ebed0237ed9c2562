"""Opening a cache directory: who may, what it must hold, and what is said when it cannot be used."""

import ctypes
import errno
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cairn.codec import Shard
from cairn.errors import LockedError, StorageError
from cairn.tier.disk import DiskTier
from cairn.tier.disk_directory import CacheDirectory, in_use, plan_superblock
from tests.tier.rig import GEOMETRY, PADDED, SLOT_BYTES, capacity, get, opened, prompt, put

LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def mounted(path: Path, kind: str, options: str) -> Iterator[None]:
    """A small file system of its own; skips where this process may not mount one."""
    path.mkdir()
    if LIBC.mount(kind.encode(), str(path).encode(), kind.encode(), 0, options.encode()):
        pytest.skip(f"cannot mount {kind}: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        LIBC.umount(str(path).encode())


@contextmanager
def forked(first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A child that does this first, and lives as long as the context."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        first()
        os.write(tell, b"!")
        signal.pause()
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"!"
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def open_tier(path: Path, slots: int = 8) -> DiskTier:
    return DiskTier(path, geometry=GEOMETRY, capacity_bytes=capacity(slots), threads=1)


def test_a_second_owner_is_told_who_the_first_is(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        put(tier, prompt(1, 2))
        with pytest.raises(LockedError, match=rf"in use by process {os.getpid()}; stop that one or give another"):
            open_tier(tmp_path)
        assert in_use(tmp_path)
        assert get(tier, prompt(1, 2)) == [None] * 2
    assert not in_use(tmp_path)


def test_a_second_process_is_told_who_the_first_is(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from tests.tier.test_disk_directory import open_tier
try:
    open_tier(Path({str(tmp_path)!r}))
except OSError as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""
    command = [sys.executable, "-c", script]
    with opened(tmp_path):
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert second.returncode == 1
    assert second.stderr.startswith(f"LockedError: {tmp_path}: in use by process {os.getpid()};")
    assert second.stderr.count("\n") == 1


def test_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            CacheDirectory(tmp_path, plan_superblock(GEOMETRY, Shard(), capacity(4)))
            os.write(tell, b"!")
            signal.pause()
        finally:
            os._exit(3)
    assert os.read(ready, 1) == b"!"
    assert in_use(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    open_tier(tmp_path).close(10)


def test_another_kind_of_block_is_refused(tmp_path: Path) -> None:
    open_tier(tmp_path).close(10)
    with pytest.raises(StorageError, match=r"made for geometry .*head_dim=64.*, not .*head_dim=40.*; give another"):
        DiskTier(tmp_path, geometry=PADDED, capacity_bytes=capacity(8))
    with pytest.raises(StorageError, match=r"made for shard Shard\(rank=0, of=1\), not Shard\(rank=1, of=2\)"):
        DiskTier(tmp_path, geometry=GEOMETRY, capacity_bytes=capacity(8), shard=Shard(1, 2))
    open_tier(tmp_path).close(10)


def test_every_byte_of_the_superblock_counts(tmp_path: Path) -> None:
    open_tier(tmp_path).close(10)
    whole = (tmp_path / "superblock").read_bytes()
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        (tmp_path / "superblock").write_bytes(damaged)
        with pytest.raises(StorageError, match="superblock is damaged; delete the directory"):
            open_tier(tmp_path)
    for size in (0, 10, 100, 4095):
        (tmp_path / "superblock").write_bytes(whole[:size])
        with pytest.raises(StorageError, match="superblock is damaged"):
            open_tier(tmp_path)
    (tmp_path / "superblock").write_bytes(whole)
    open_tier(tmp_path).close(10)


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a thesis")
    with pytest.raises(StorageError, match="holds 'data' but no superblock; give an empty directory"):
        open_tier(tmp_path)
    assert (tmp_path / "data").read_text() == "a thesis"
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"File exists|Not a directory"):
        open_tier(tmp_path / "file")


def test_no_space_is_said_before_anything_is_taken(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "tmpfs", "size=256k"):
        path = tmp_path / "small" / "cache"
        with pytest.raises(StorageError, match=r"needs \d+ more bytes, \d+ are free; free some or lower"):
            open_tier(path, slots=100)
        assert [file.name for file in path.iterdir()] == ["lock"]
        with opened(path, slots=8) as tier:
            put(tier, prompt(1, 3))
        with pytest.raises(StorageError, match="needs"):
            open_tier(path, slots=100)
        with opened(path, slots=8) as tier:
            assert get(tier, prompt(1, 3)) == [None] * 3


def test_a_refused_allocation_is_an_error_in_one_line(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the free space is there, and yet the system says no."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * SLOT_BYTES, hard))
    try:
        with pytest.raises(StorageError, match="needs"):
            open_tier(tmp_path, slots=16)
        open_tier(tmp_path, slots=8).close(10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    open_tier(tmp_path, slots=16).close(10)


def test_a_lock_that_cannot_be_signed_is_not_kept(tmp_path: Path) -> None:
    """Not even the pid has room; once there is some, the same process may try again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(StorageError, match="give a directory that can be written"):
            open_tier(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    open_tier(tmp_path).close(10)


def test_a_child_that_was_forked_does_not_keep_the_lock(tmp_path: Path) -> None:
    """As a data loader's worker does, which outlives the engine."""
    directory = CacheDirectory(tmp_path, plan_superblock(GEOMETRY, Shard(), capacity(4)))
    with forked(directory.close):  # of no consequence to its owner
        assert in_use(tmp_path)
    with forked():
        directory.close()
        assert not in_use(tmp_path)
        open_tier(tmp_path).close(10)


def test_a_table_that_cannot_be_read_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr("cairn.tier.disk.recover", broken)
    with pytest.raises(StorageError, match="injected; check the disk"):
        open_tier(tmp_path)
    held = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
    assert not [path for path in held if path.is_relative_to(tmp_path)]


def test_a_file_system_without_o_direct_serves_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mounted(tmp_path / "ram", "ramfs", ""), caplog.at_level(logging.WARNING, logger="cairn"):
        path = tmp_path / "ram" / "cache"
        with opened(path, slots=8) as tier:
            assert tier.stats()["direct_io"] == 0
            put(tier, prompt(1, 3))
            assert get(tier, prompt(1, 3)) == [None] * 3
        assert caplog.text.count("refuses O_DIRECT") == 1


def test_unwritable_directories_are_an_error_in_one_line() -> None:
    with pytest.raises(StorageError, match=r"/proc/cairn: .*; give a directory that can be written"):
        open_tier(Path("/proc/cairn"))
