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
from cairn.transport.file_parts import Read, read_files, rehearse, write_parts
from cairn.transport.moving import sums_of

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REASONS: Final = {
    errno.ENOENT: Reason.ABSENT,
    errno.ETIMEDOUT: Reason.TIMEOUT,
    # Somebody else's pipe, socket or directory.
    **dict.fromkeys((errno.ESPIPE, errno.ENXIO, errno.EISDIR), Reason.FOREIGN),
}
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
            except FileNotFoundError:
                found.append(False)
            except OSError:
                return Reason.IO_ERROR
        return found

    def put(self, puts: Sequence[Put], *, deadline: float) -> list[Reason | None]:
        return [Reason.TIMEOUT if time.monotonic() > deadline else self._put(put) for put in puts]

    def get_into(self, gets: Sequence[Get], *, deadline: float) -> list[int | Reason]:
        reads = [Read(self._path(get.name), get.offset, get.parts, get.sums) for get in gets]
        found: list[int | Reason] = []
        for read, (size, changed) in zip(reads, read_files(reads, deadline), strict=True):
            if size >= 0:
                self._used(read.path, changed)
            found.append(size if size >= 0 else _REASONS.get(-size, Reason.IO_ERROR))
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
        self._sweeper.close()

    def sweep(self) -> bool:
        """Brings the path within its limits now; False if another process is at it."""
        return self._sweeper.sweep()

    def _put(self, put: Put) -> Reason | None:
        path, temporary = self._path(put.name), self._temporary()
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _write(fd, put)
                if self._fsync:
                    os.fdatasync(fd)
            finally:
                os.close(fd)
            self._publish(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            return Reason.NO_SPACE if error.errno in _FULL else Reason.IO_ERROR
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


def _write(fd: int, put: Put) -> None:
    """Writes an object's bytes: the tail holds checksums of the blocks. Raises OSError."""
    sums = sums_of(put.blocks) if put.tail else None
    write_parts(fd, 0, put.blocks, sums)
    if put.tail and sums is not None:
        write_parts(fd, put.size - put.tail_bytes, [put.tail(sums)])
