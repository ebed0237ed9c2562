"""Where the node listens: a socket in the file system that only its user may open, and a lock beside it."""

import contextlib
import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import Final

from cairn.errors import InputError, LockedError, StorageError

#: sun_path takes 108 bytes, and the lock's name is longer than the socket's.
_LONGEST: Final = 100


def socket_path(address: str) -> Path:
    """The path of an `ipc://` address. Raises InputError for another."""
    scheme, _, path = address.partition("://")
    if scheme != "ipc" or not path.startswith("/") or len(path.encode()) > _LONGEST:
        raise InputError(
            f"{address!r}: a node's address is ipc:// and the absolute path of a socket of at most {_LONGEST} bytes, "
            "as ipc:///run/cairn/node.sock"
        )
    return Path(path)


class Address:
    """An address that this process owns until `release`: nobody else can listen at it.

    Raises InputError for what is none, LockedError while another node has it, StorageError where it cannot be made.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.path = socket_path(address)
        self._lock_path = self.path.with_name(self.path.name + ".lock")
        self._fd = -1
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.path.exists() and not stat.S_ISSOCK(self.path.stat().st_mode):
                raise InputError(f"{address}: there is a file that is no socket; give another address")
            self._fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._take()
        except BlockingIOError:
            owner = self._owner()
            self.release()
            raise LockedError(f"{address}: in use by process {owner}; stop that one or give another address") from None
        except OSError as error:
            self.release()
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{address}: {error.strerror}; give a path in a directory that can be written") from None

    def bind(self) -> socket.socket:
        """A socket that can listen here, for this user alone."""
        made, before = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), os.umask(0o177)
        try:
            self.path.unlink(missing_ok=True)  # a dead node's
            made.bind(str(self.path))
        except OSError as error:
            made.close()
            raise StorageError(f"{self.address}: cannot be bound: {error.strerror}; give another address") from None
        finally:
            os.umask(before)
        self.path.chmod(0o600)
        return made

    def release(self) -> None:
        """Takes the socket away and gives up the lock, whose file stays: taking it away would let two have it."""
        if self._fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
            os.close(self._fd)
            self._fd = -1

    def _take(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            self._fd = -1
            raise
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _owner(self) -> str:
        try:
            return self._lock_path.read_text().strip() or "unknown"
        except OSError:
            return "unknown"
