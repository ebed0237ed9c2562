"""The gate: what stands between a client's processes and the rows that they hold.

A page of shared memory a session, with one word: how many threads are inside, and whether the gate is closed.

    enter   add 1 to the count; if the word had CLOSED in it, take it back and stay out
    leave   subtract 1
    close   set CLOSED (the node only); from then on nobody gets in

Rows are touched inside only. The node gives what a session held to others only once its gate is closed and nobody is
inside, or no process has the gate open any more. All steps are atomic and in one order for all processes, so this needs
no clock: who is inside when the gate closes was there before, and the node waits for it; who comes later stays out. A
thread that is stopped inside for hours (SIGSTOP, a suspended machine) delays the node for hours, and then goes on in
rows that still are its own.

Whoever has the gate open holds a shared lock (flock) on it, which the kernel drops when the last of the processes that
have it is gone, however it died. So the count of a process that was killed inside is not waited for.
"""

import fcntl
import mmap
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np

from cairn.copy.memory import atomic_add, atomic_or
from cairn.errors import StorageError
from cairn.jit import kernel
from cairn.node.base import Memory

_BYTES: Final = 4096
_CLOSED: Final = 1 << 62


@kernel
def _enter(word: int) -> bool:
    if atomic_add(word, 1) & _CLOSED:
        atomic_add(word, -1)
        return False
    return True


@kernel
def _leave(word: int) -> None:
    atomic_add(word, -1)


@kernel
def _close(word: int) -> int:
    before: int = atomic_or(word, _CLOSED)
    return before


class _Page:
    """One mapping of a gate's page, and the descriptor that carries the lock."""

    fd = -1

    def __init__(self, path: Path, flags: int) -> None:
        self.path = path
        self.fd = os.open(path, flags | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            if flags & os.O_CREAT:
                os.posix_fallocate(self.fd, 0, _BYTES)
            elif os.fstat(self.fd).st_size != _BYTES:
                raise StorageError(f"{path}: is no gate of a node")
            self._map = mmap.mmap(self.fd, _BYTES)
        except BaseException:
            self.drop()
            raise
        self._words = np.frombuffer(self._map, np.int64)
        self.word = int(self._words.ctypes.data)

    def drop(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Gate(_Page):
    """The node's side: made by it, closed by it. For the node's loop alone."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where it cannot be made."""
        super().__init__(path, os.O_CREAT | os.O_EXCL)

    def close(self) -> bool:
        """From now on nobody gets in; whether nobody is inside any more either. To be asked again until it is."""
        if not _close(self.word) & ~_CLOSED:
            return True
        return not self.attended()

    def attended(self) -> bool:
        """Whether any process has the gate open."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        return False

    def remove(self) -> None:
        """Takes it away for good."""
        with suppress(FileNotFoundError):
            self.path.unlink()
        self.drop()


class Entrance(_Page):
    """A client's side: `pass_through` an open gate, as many threads as like to. Lives as long as somebody refers to it.

    Raises OSError or StorageError where there is no such gate, or the node looks at it right now.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, 0)
        # Never a wait: the node takes its own lock for a moment only, to see whether anybody is there, but a node that
        # is stopped in that moment would keep it.
        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            self.drop()
            raise

    def __del__(self) -> None:
        self.drop()

    def enter(self) -> bool:
        """Whether the caller is inside now; then it must `leave`. Else it must not touch the rows."""
        return _enter(self.word)

    def leave(self) -> None:
        _leave(self.word)


class Passage:
    """A context in which `memory` may be touched; None where the gate was closed. As a context manager, once."""

    __slots__ = ("_entrance", "_inside", "_memory")

    def __init__(self, entrance: Entrance, memory: Memory) -> None:
        self._entrance = entrance
        self._memory = memory
        self._inside = False

    def __enter__(self) -> Memory | None:
        self._inside = self._entrance.enter()
        return self._memory if self._inside else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._inside:
            self._entrance.leave()
