"""A segment's life: whether the memory that a process has donated may still be believed.

A page of shared memory a donation, made by the node, with one word: the donation's number, or 0 once it is over. The
node ends it when it takes the donation out of its directory; the owner ends it before it uses the memory under another
session. And the owner holds a record lock (fcntl) on the page, which the kernel drops when the owner dies, before it
closes the dead process's devices, which is when VRAM goes back to the driver. Records' locks go when a descriptor is
closed, and not with the last reference to it, as flock's do: that gives the order.

So whoever has copied out of a segment, and then finds the word unchanged and the lock held, has copied what was there.

Behind the page stands what the node knows of the segment's blocks (`cairn.index.shared`), for those who read without
asking it. The page's second word counts who does so now: their owner waits for them before he takes the memory back. A
reader that was killed is waited for until time is up.
"""

import fcntl
import mmap
import os
import secrets
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np

from cairn.copy.memory import atomic_add
from cairn.errors import StorageError
from cairn.index import shared_bytes
from cairn.jit import kernel

_PAGE: Final = 4096
_FLOCK: Final = "hhqqi4x"  # struct flock: type, whence, start, length, pid

_token: tuple[int, bytes] = (0, b"")

#: Of the pages that this process has the lock of: descriptors that others in it have done with, and their mappings,
#: which have descriptors of their own, by the page's path. To close any of them would drop the lock.
_kept: dict[Path, list[tuple[int, mmap.mmap | None]]] = {}
_keeping = threading.Lock()


@kernel
def _count(word: int, readers: int) -> int:
    before: int = atomic_add(word, readers)
    return before


def process_token() -> bytes:
    """16 bytes that name this process: record locks do not tell a process of its own."""
    global _token
    if _token[0] != os.getpid():  # the first call, or the first after a fork
        _token = os.getpid(), secrets.token_bytes(16)
    return _token[1]


class Life:
    """One mapping of a donation's page, and of the index of its `slots` blocks, which is `index`. owner: the
    `process_token` of the process that has made the donation.

    Thread-safe, but for `close`. Raises StorageError or OSError where there is no such page.
    """

    def __init__(self, path: Path, number: int, owner: bytes, slots: int, *, make: bool = False) -> None:
        self.path = path
        self.number = number
        self._own = owner == process_token()
        self._holds = False
        self._mapped: mmap.mmap | None = None
        size = _PAGE + shared_bytes(slots)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if make else 0), 0o600)
        try:
            if make:
                os.posix_fallocate(self._fd, 0, size)
            elif os.fstat(self._fd).st_size != size:
                raise StorageError(f"{path}: is no page of a node")
            self._mapped = mapped = mmap.mmap(self._fd, size)
        except BaseException:
            if make:
                path.unlink(missing_ok=True)
            self.close()
            raise
        self._word = np.frombuffer(mapped, np.int64, 1)
        self._readers = int(self._word.ctypes.data) + 8
        self.index = np.frombuffer(mapped, np.uint8, offset=_PAGE)
        if make:
            self._word[0] = number

    def hold(self) -> None:
        """The owner's part: from now on it counts as alive. Raises OSError if another process holds it."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with _keeping:
            self._holds = True
            _kept[self.path] = []

    def end(self) -> None:
        """From now on nothing that is read there is believed."""
        self._word[0] = 0

    def sound(self) -> bool:
        """Whether all that was read until now was right: the donation is not over, and its owner lives."""
        return int(self._word[0]) == self.number and (self._own or self._held())

    def over(self) -> bool:
        """Whether the donation is known to be over."""
        return int(self._word[0]) != self.number

    def enter(self) -> None:
        """Somebody reads without a pin, until `leave`: to be said before it is looked whether it is over."""
        _count(self._readers, 1)

    def leave(self) -> None:
        _count(self._readers, -1)

    def readers(self) -> int:
        """How many read without a pin."""
        return _count(self._readers, 0)

    def _held(self) -> bool:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            found = fcntl.fcntl(self._fd, fcntl.F_GETLK, asked)
        except (OSError, ValueError):  # closed meanwhile: -1 is no descriptor to Python
            return False
        return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """Gives it back; the owner's counts as dead then. Idempotent."""
        if self._fd < 0:
            return
        done, self._fd, self._mapped = [(self._fd, self._mapped)], -1, None
        with _keeping:
            if self._holds:
                done += _kept.pop(self.path, [])
            elif self.path in _kept:
                _kept[self.path] += done
                return
        for descriptor, _ in done:
            os.close(descriptor)

    def remove(self) -> None:
        """The node's part: ends it and takes it away."""
        self.end()
        with suppress(FileNotFoundError):
            self.path.unlink()
        self.close()
