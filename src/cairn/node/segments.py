"""A node's segments of shared memory: their names, the lock that says whose they are, and what dead nodes left.

    cairn-node-ID.lock      flock-ed by the node as long as it lives
    cairn-node-ID.arena-N   one a pool
    cairn-node-ID.gate-N    one a session
    cairn-node-ID.life-N    one a donation of VRAM

ID is drawn anew by every node, so that a name never means another memory than it did. Taking a name away takes nothing
from those who have the segment mapped: a client of a dead node goes on in an arena that is nobody else's.
"""

import fcntl
import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Final

from cairn.errors import StorageError

log = logging.getLogger(__name__)

HOME: Final = Path("/dev/shm")
_PREFIX: Final = "cairn-node-"
_ATTEMPTS: Final = 8


def path_of(name: str) -> Path:
    """Where a segment is. Raises StorageError for what is no name of a node's segment."""
    if "/" in name or not name.startswith(_PREFIX):
        raise StorageError(f"{name!r}: is no segment of a node")
    return HOME / name


class Segments:
    """The names of one node. For its loop alone, but for `arena`."""

    def __init__(self) -> None:
        """Raises StorageError where shared memory cannot be had."""
        for _ in range(_ATTEMPTS):
            self.id = secrets.token_hex(8)
            self._lock = HOME / f"{_PREFIX}{self.id}.lock"
            try:
                self._fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise StorageError(f"{HOME}: {error.strerror}; a node needs shared memory") from None
            if _owned(self._fd, self._lock):
                return
            os.close(self._fd)  # somebody who was sweeping took it for a dead node's
        raise StorageError(f"{HOME}: no name could be had in {_ATTEMPTS} attempts; is something sweeping it?")

    def arena(self, number: int) -> str:
        """An arena's name, as `cairn.tier.arena` has it (which puts `cairn-` before it)."""
        return f"node-{self.id}.arena-{number}"

    def gate(self, number: int) -> str:
        """A gate's name."""
        return f"{_PREFIX}{self.id}.gate-{number}"

    def life(self, number: int) -> str:
        """The name of a donation's page."""
        return f"{_PREFIX}{self.id}.life-{number}"

    def close(self) -> None:
        """Takes all names away. Idempotent."""
        if self._fd >= 0:
            _remove(self.id)
            os.close(self._fd)
            self._fd = -1


def sweep() -> int:
    """Takes away what nodes left that are dead; returns how many. Whose lock cannot be had is alive, or another
    user's.
    """
    swept = 0
    for lock in HOME.glob(f"{_PREFIX}*.lock"):
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        if _owned(fd, lock):
            name = lock.name.removeprefix(_PREFIX).removesuffix(".lock")
            _remove(name)
            log.info("swept the shared memory of node %s, which is dead", name)
            swept += 1
        os.close(fd)
    return swept


def _owned(fd: int, path: Path) -> bool:
    """Takes the lock; whether it is the file's that stands there now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(fd).st_ino == path.stat().st_ino
    except OSError:
        return False


def _remove(name: str) -> None:
    """The lock last: who is killed in between leaves the rest to the next sweep."""
    for path in sorted(HOME.glob(f"{_PREFIX}{name}.*"), key=lambda path: path.suffix == ".lock"):
        with suppress(FileNotFoundError):
            path.unlink()
