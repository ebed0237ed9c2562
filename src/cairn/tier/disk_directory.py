"""A cache directory: its lock, its superblock, and files of exactly the size it was promised.

    lock        flock-ed by the owner, whose pid it holds
    superblock  what the directory holds: geometry, shard, slot size, number of slots (a sealed header)
    table       one 64-byte record a slot (`disk_table`)
    data        the slots, preallocated (`disk_slots`)

The superblock is written first and replaced in one piece; the sizes of the files follow from it. A process killed in
between leaves files of another size, which the next `open_directory` puts right.
"""

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Final

import msgspec

from cairn.codec import Shard
from cairn.codec.seal import HEADER_LIMIT, seal, unseal
from cairn.errors import InputError, LockedError, StorageError
from cairn.kv import CANONICAL, KVGeometry, Layout
from cairn.observe.reasons import Reason

MAGIC: Final = b"CAIRNDIR"
VERSION: Final = 1
PAGE: Final = HEADER_LIMIT
RECORD_BYTES: Final = 64

#: What the file system may add to the files: the lock's and the superblock's page, and its own block maps.
_FIXED_BYTES: Final = 64 * 1024
_BLOCK_MAP_BYTES: Final = 64  # a slot: its extents, were each slot split in two and every map page half empty

_LOCK_RETRY_SECONDS: Final = 0.05  # an inspector holds the lock for microseconds


class Superblock(msgspec.Struct, frozen=True, array_like=True):
    """What a cache directory holds (msgpack array in a sealed header). layout: of the rows of who opened it last.

    lossy: whether some of it may have come out of a codec with loss; never mixed with what has not.
    """

    geometry: KVGeometry
    shard: Shard
    slot_bytes: int
    slots: int
    layout: Layout = CANONICAL
    lossy: bool = False

    @property
    def table_bytes(self) -> int:
        return -(-self.slots * RECORD_BYTES // PAGE) * PAGE

    @property
    def data_bytes(self) -> int:
        return self.slots * self.slot_bytes


def plan_superblock(
    geometry: KVGeometry, shard: Shard, capacity_bytes: int, layout: Layout = CANONICAL, *, lossy: bool = False
) -> Superblock:
    """As many slots as fit `capacity_bytes`, everything on disk included. Raises InputError if that is none."""
    slot_bytes = PAGE + -(-geometry.block_bytes // PAGE) * PAGE
    slots = (capacity_bytes - _FIXED_BYTES - PAGE) // (slot_bytes + RECORD_BYTES + _BLOCK_MAP_BYTES)
    if slots < 1:
        least = _FIXED_BYTES + PAGE + slot_bytes + RECORD_BYTES + _BLOCK_MAP_BYTES
        raise InputError(f"disk capacity of {capacity_bytes} bytes: must be at least {least} bytes, one KV block")
    return Superblock(geometry, shard, slot_bytes, slots, layout, lossy)


class CacheDirectory:
    """A cache directory that this process owns until `close`: its path, its superblock, and files of the right size.

    table_fd: the table, opened for everyone who needs it; whoever uses it stops before `close`.
    """

    def __init__(self, path: Path, wanted: Superblock) -> None:
        """Opens or makes the directory, with `wanted.slots` slots from now on.

        Raises LockedError while another process owns it, StorageError if it holds something else or cannot be used.
        """
        self.path = path
        self.superblock = wanted
        self.table_fd = self._lock_fd = -1
        self._owner = os.getpid()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock_fd = _lock(path)
            self._settle(wanted)
        except CacheUnusable:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise StorageError(f"{path}: {error.strerror or error}; give a directory that can be written") from None

    def _settle(self, wanted: Superblock) -> None:
        found = read_superblock(self.path)
        if found is None:
            strangers = [name for name in ("table", "data") if (self.path / name).exists()]
            if strangers:
                raise StorageError(f"{self.path}: holds {strangers[0]!r} but no superblock; give an empty directory")
        else:
            _refuse_other(self.path, found, wanted)
        _require_space(self.path, wanted)
        # Before the other files: without a superblock they would be taken for somebody else's.
        if found != wanted:
            _write_superblock(self.path, wanted)
        self.table_fd = _open(self.path / "table")
        # Its last page has room for records of slots that went: they are not to come back with more capacity.
        os.ftruncate(self.table_fd, min(os.fstat(self.table_fd).st_size, wanted.slots * RECORD_BYTES))
        _resize(self.path, self.table_fd, wanted.table_bytes)
        data_fd = _open(self.path / "data")
        try:
            _resize(self.path, data_fd, wanted.data_bytes)
        finally:
            os.close(data_fd)
        _sync_directory(self.path)

    def close(self) -> None:
        """Closes the files and gives up the lock, which a child that was forked meanwhile has, too. Idempotent."""
        if self._lock_fd >= 0 and os.getpid() == self._owner:  # a child gives up nothing
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
        for fd in (self.table_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self.table_fd = self._lock_fd = -1


#: Errors that already are the one clear line.
CacheUnusable = (StorageError, InputError)


def read_superblock(path: Path) -> Superblock | None:
    """The superblock of a cache directory, None if it has none. Raises StorageError if it is damaged."""
    try:
        data = (path / "superblock").read_bytes()[:PAGE]
    except FileNotFoundError:
        return None
    body = unseal(MAGIC, VERSION, memoryview(data))
    if body is Reason.FOREIGN:
        raise StorageError(f"{path}: written by another version of Cairn; delete it or give another directory")
    try:
        if isinstance(body, bytes):
            return msgspec.msgpack.decode(body, type=Superblock)
    except msgspec.MsgspecError:
        pass
    raise StorageError(f"{path}: its superblock is damaged; delete the directory (a cache only) and start again")


def _refuse_other(path: Path, found: Superblock, wanted: Superblock) -> None:
    for name in ("geometry", "shard", "slot_bytes", "lossy"):
        if getattr(found, name) != getattr(wanted, name):
            raise StorageError(
                f"{path}: made for {name} {getattr(found, name)}, not {getattr(wanted, name)}; "
                f"give another directory, or delete this one"
            )


def _write_superblock(path: Path, superblock: Superblock) -> None:
    draft = path / "superblock.new"
    with draft.open("wb") as file:
        file.write(seal(MAGIC, VERSION, msgspec.msgpack.encode(superblock), PAGE))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path / "superblock")
    _sync_directory(path)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _require_space(path: Path, wanted: Superblock) -> None:
    """Says at once what would fail later, and before anything has been taken."""
    files = (path / "data", path / "table")
    had = sum(file.stat().st_blocks * 512 for file in files if file.exists())
    need = wanted.data_bytes + wanted.table_bytes + _FIXED_BYTES - had
    system = os.statvfs(path)
    free = system.f_bavail * system.f_frsize
    if need > free and system.f_blocks:  # some (ramfs) tell nothing
        raise _no_space(path, need, free)


def _resize(path: Path, fd: int, size: int) -> None:
    before = os.fstat(fd).st_size
    if before > size:
        os.ftruncate(fd, size)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.ftruncate(fd, min(before, size))
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        system = os.statvfs(path)
        raise _no_space(path, size - before, system.f_bavail * system.f_frsize) from None


def _no_space(path: Path, need: int, free: int) -> StorageError:
    return StorageError(f"{path}: needs {need} more bytes, {free} are free; free some or lower the disk capacity")


def lock_owner(path: Path) -> str:
    """Who holds the lock, as text for people: a pid, or "unknown"."""
    try:
        return (path / "lock").read_text().strip() or "unknown"
    except OSError:
        return "unknown"


def _lock(path: Path) -> int:
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            _take(fd)
        except BlockingIOError:
            time.sleep(_LOCK_RETRY_SECONDS)
            _take(fd)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        os.close(fd)
        if not isinstance(error, BlockingIOError):
            raise
        owner = lock_owner(path)
        raise LockedError(f"{path}: in use by process {owner}; stop that one or give another directory") from None
    return fd


def _take(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_use(path: Path) -> bool:
    """Whether a process owns the directory now. Holds the lock, shared, for no longer than it takes to ask."""
    try:
        fd = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
