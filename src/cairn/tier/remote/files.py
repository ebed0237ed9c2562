"""Objects as files below any path that several hosts share: NFS, Lustre, 3FS, or a plain directory.

An object is written under a temporary name and published by `rename`, which is atomic on POSIX file systems and on NFS:
readers and other writers see it whole or not at all, and of two writers either may win, since both write the same. One
file an object, in 256 directories a kind. Power cuts may leave a torn file where `fsync` is off; its checksums say so.
"""

import contextlib
import errno
import itertools
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from cairn.errors import StorageError
from cairn.observe.reasons import Reason
from cairn.tier.remote.base import Get, ObjectStore, Put
from cairn.tier.remote.sweep import TEMPORARY, Sweeper

_VECTORS: Final = 512  # of the 1024 that Linux takes in one call
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: An object's time of use is renewed when it is older than this share of its life, to spare the server.
_RENEW_SHARE: Final = 8


class FileStore(ObjectStore):
    """root: made if missing. fsync: an object is on the device before it is published. ttl_s: objects not used for so
    long go. capacity_bytes: objects go, the longest unused first, when all together take more; checked by one of the
    processes that use the path, about once a minute, so it may be exceeded in between.

    A file system that hangs (a hard NFS mount without its server) cannot be interrupted: the call, its thread and its
    rows wait with it, whatever the deadline; requests do not, since they watch their own. Raises StorageError if root
    cannot be used.
    """

    object_bytes = 8 << 20
    probe_names = 4096

    def __init__(
        self, root: Path, *, fsync: bool = False, capacity_bytes: int | None = None, ttl_s: float | None = None
    ) -> None:
        self._root = root
        self._fsync = fsync
        self._renew_s = min(ttl_s or 86_400.0, 86_400.0) / _RENEW_SHARE
        self._places: dict[bytes, Path] = {}
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self._temporary()
            probe.touch(mode=0o600)
            probe.unlink()
        except OSError as error:
            raise StorageError(f"{root}: {error.strerror or error}; must be a directory to write to") from None
        self._sweeper = Sweeper(root, capacity_bytes, ttl_s)

    def exists(self, names: Sequence[bytes], *, deadline: float) -> list[bool] | Reason:
        found = []
        for name in names:
            if time.monotonic() > deadline:
                return Reason.TIMEOUT
            path = self._path(name)
            try:
                self._used(path, path.stat().st_mtime)
                found.append(True)
            except FileNotFoundError:
                found.append(False)
            except OSError:
                return Reason.IO_ERROR
        return found

    def put(self, puts: Sequence[Put], *, deadline: float) -> list[Reason | None]:
        return [Reason.TIMEOUT if time.monotonic() > deadline else self._put(put) for put in puts]

    def get_into(self, gets: Sequence[Get], *, deadline: float) -> list[int | Reason]:
        return [Reason.TIMEOUT if time.monotonic() > deadline else self._get(get) for get in gets]

    def delete(self, names: Sequence[bytes], *, deadline: float) -> Reason | None:
        for name in names:
            if time.monotonic() > deadline:
                return Reason.TIMEOUT
            try:
                self._path(name).unlink(missing_ok=True)
            except OSError:
                return Reason.IO_ERROR
        return None

    def health(self, *, deadline: float) -> Reason | None:
        return None if self._root.is_dir() else Reason.IO_ERROR

    def stats(self) -> Mapping[str, float]:
        return self._sweeper.stats()

    def close(self) -> None:
        self._sweeper.close()

    def sweep(self) -> bool:
        """Brings the path within its limits now; False if another process is at it."""
        return self._sweeper.sweep()

    def _put(self, put: Put) -> Reason | None:
        path, temporary = self._path(put.name), self._temporary()
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                whole = _write_all(fd, put.parts)
                if self._fsync:
                    os.fdatasync(fd)
            finally:
                os.close(fd)
            if not whole:
                raise OSError(errno.ENOSPC, "cut short")
            self._publish(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            return Reason.NO_SPACE if error.errno in _FULL else Reason.IO_ERROR
        self._sweeper.wrote(put.size)
        return None

    def _publish(self, temporary: Path, path: Path) -> None:
        try:
            temporary.rename(path)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.rename(path)
        if self._fsync:
            fd = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _get(self, get: Get) -> int | Reason:
        path = self._path(get.name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return Reason.ABSENT
        except OSError:
            return Reason.IO_ERROR
        try:
            self._used(path, os.fstat(fd).st_mtime)
            return _read_all(fd, get.offset, get.parts)
        except OSError:
            return Reason.IO_ERROR
        finally:
            os.close(fd)

    def _used(self, path: Path, since: float) -> None:
        """Renews the time of the last use, which the sweeper goes by."""
        if time.time() - since > self._renew_s:
            with contextlib.suppress(OSError):
                os.utime(path)

    def _path(self, name: bytes) -> Path:
        kind, _, key = name.decode().rpartition("/")
        return self._root / kind / key[:2] / key

    def _temporary(self) -> Path:
        return self._root / f"{TEMPORARY}{_HOST}-{os.getpid()}-{next(_NUMBERS)}"


_HOST: Final = socket.gethostname()
_NUMBERS: Final = itertools.count(time.time_ns())


def _write_all(fd: int, parts: Sequence[memoryview]) -> bool:
    """Whether all bytes of the parts were written."""
    for start in range(0, len(parts), _VECTORS):
        left = _behind(list(parts[start : start + _VECTORS]), 0)
        while left:
            done = os.writev(fd, left)
            if not done:
                return False
            left = _behind(left, done)
    return True


def _read_all(fd: int, offset: int, parts: Sequence[memoryview]) -> int:
    """Fills parts from `offset` on; returns how many bytes there were."""
    total = 0
    for start in range(0, len(parts), _VECTORS):
        left = _behind(list(parts[start : start + _VECTORS]), 0)
        while left:
            done = os.preadv(fd, left, offset + total)
            total += done
            if not done:
                return total
            left = _behind(left, done)
    return total


def _behind(parts: list[memoryview], done: int) -> list[memoryview]:
    """What is left of parts after their first `done` bytes."""
    for i, part in enumerate(parts):
        if done < len(part):
            return [part[done:], *parts[i + 1 :]]
        done -= len(part)
    return []
