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
from functools import partial
from pathlib import Path
from typing import Final

from cairn.errors import StorageError
from cairn.observe.reasons import Reason
from cairn.tier.remote.base import Get, ObjectStore, Put
from cairn.tier.remote.sweep import TEMPORARY, Sweeper
from cairn.tier.workers import GRACE_S, Workers
from cairn.transport.file_parts import Read, read_files, rehearse, write_parts
from cairn.transport.moving import Checksums

#: Somebody else's pipe, socket or directory.
_FOREIGN: Final = dict.fromkeys((errno.ESPIPE, errno.ENXIO, errno.EISDIR), Reason.FOREIGN)
_READING: Final = {errno.ENOENT: Reason.ABSENT, errno.ETIMEDOUT: Reason.TIMEOUT, **_FOREIGN}
_WRITING: Final = {**dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), Reason.NO_SPACE), **_FOREIGN}
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
    calls = 1  # each begins with the interpreter in no cache: 0.1 ms

    def __init__(
        self, root: Path, *, fsync: bool = False, capacity_bytes: int | None = None, ttl_s: float | None = None
    ) -> None:
        self._root = root
        self._base = str(root)
        self._fsync = fsync
        self._renew_s = min(ttl_s or 86_400.0, 86_400.0) / _RENEW_SHARE
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = Path(self._temporary())
            probe.touch(mode=0o600)
            probe.unlink()
        except OSError as error:
            raise StorageError(f"{root}: {error.strerror or error}; must be a directory to write to") from None
        rehearse()
        self._summer = Workers(1, "cairn-files-sum")
        self._sweeper = Sweeper(root, capacity_bytes, ttl_s)

    def together(self, size: int) -> int:
        return max(1, 2 * self.object_bytes // size)

    def exists(self, names: Sequence[bytes], *, deadline: float) -> list[bool] | Reason:
        found = []
        for name in names:
            if time.monotonic() > deadline:
                return Reason.TIMEOUT
            path = self._path(name)
            try:
                self._used(path, os.stat(path).st_mtime)  # noqa: PTH116
                found.append(True)
            except OSError as error:
                why = _reason(error.errno, path, _READING)
                if why not in (Reason.ABSENT, Reason.FOREIGN):
                    return why
                found.append(False)
        return found

    def put(self, puts: Sequence[Put], *, deadline: float) -> list[Reason | None]:
        # A thread sums ahead of this one, which writes: the tails come last. What it has not come to is summed here.
        sums = [Checksums(put.blocks if put.tail else ()) for put in puts]
        self._summer.submit(partial(_sum, sums), urgent=False)
        try:
            both = zip(puts, sums, strict=True)
            return [Reason.TIMEOUT if time.monotonic() > deadline else self._put(*pair) for pair in both]
        finally:
            for each in sums:
                each.drop()

    def get_into(self, gets: Sequence[Get], *, deadline: float) -> list[int | Reason]:
        reads = [Read(self._path(get.name), get.offset, get.parts, get.sums) for get in gets]
        found: list[int | Reason] = []
        for read, (size, changed) in zip(reads, read_files(reads, deadline), strict=True):
            if size >= 0:
                self._used(read.path, changed)
            found.append(size if size >= 0 else _reason(-size, read.path, _READING))
        return found

    def delete(self, names: Sequence[bytes], *, deadline: float) -> Reason | None:
        for name in names:
            if time.monotonic() > deadline:
                return Reason.TIMEOUT
            try:
                Path(self._path(name)).unlink(missing_ok=True)
            except OSError:
                return Reason.IO_ERROR
        return None

    def health(self, *, deadline: float) -> Reason | None:
        return None if self._root.is_dir() else Reason.IO_ERROR

    def stats(self) -> Mapping[str, float]:
        return self._sweeper.stats()

    def close(self) -> None:
        self._summer.stop(GRACE_S)
        self._sweeper.close()

    def sweep(self) -> bool:
        """Brings the path within its limits now; False if another process is at it."""
        return self._sweeper.sweep()

    def _put(self, put: Put, sums: Checksums) -> Reason | None:
        path, temporary = self._path(put.name), self._temporary()
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _write(fd, put, sums)
                if self._fsync:
                    os.fdatasync(fd)
            finally:
                os.close(fd)
            self._publish(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            return _reason(error.errno, path, _WRITING)
        self._sweeper.wrote(put.size)
        return None

    def _publish(self, temporary: str, path: str) -> None:
        try:
            os.rename(temporary, path)  # noqa: PTH104
        except FileNotFoundError:
            Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.rename(temporary, path)  # noqa: PTH104
        if self._fsync:
            fd = os.open(Path(path).parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _used(self, path: str, since: float) -> None:
        """Renews the time of the last use, which the sweeper goes by."""
        if time.time() - since > self._renew_s:
            with contextlib.suppress(OSError):
                os.utime(path)

    def _path(self, name: bytes) -> str:
        """As text: a Path takes longer to make than a file to open."""
        kind, _, key = name.decode().rpartition("/")
        return f"{self._base}/{kind}/{key[:2]}/{key}"

    def _temporary(self) -> str:
        return f"{self._base}/{TEMPORARY}{_HOST}-{os.getpid()}-{next(_NUMBERS)}"


_HOST: Final = socket.gethostname()
_NUMBERS: Final = itertools.count(time.time_ns())


def _reason(code: int | None, path: str, known: Mapping[int, Reason]) -> Reason:
    """Why an object is not to be had: an errno, and its path. A file of somebody else's where its directory should be
    is in the way of few objects; one further up is a path that has gone."""
    if code == errno.ENOTDIR and os.path.isdir(Path(path).parents[1]):  # noqa: PTH112 - Path's may raise
        return Reason.FOREIGN
    return known.get(code or 0, Reason.IO_ERROR)


def _sum(sums: Sequence[Checksums]) -> None:
    for each in sums:
        each.make()


def _write(fd: int, put: Put, sums: Checksums) -> None:
    """Writes an object's bytes; sums: of its blocks, for the tail. Raises OSError."""
    write_parts(fd, 0, put.blocks)
    if put.tail:
        write_parts(fd, put.size - put.tail_bytes, [put.tail(sums.make())])
