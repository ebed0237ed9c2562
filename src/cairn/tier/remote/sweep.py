"""Keeps a shared directory within its limits: the longest unused objects go first, and what dead writers left."""

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

#: How the names of files that are being written begin.
TEMPORARY: Final = ".cairn-tmp-"
_LOCK: Final = ".cairn-sweep"
#: Below it is what `Packing.name` names. What else the directory holds is somebody else's.
_OBJECTS: Final = "cairn"

INTERVAL_S: Final = 60.0
#: A writer that takes longer than this for one object is dead.
DEAD_S: Final = 3600.0
#: How long a sweep is waited for at the end; a file system that hangs keeps its thread.
CLOSE_S: Final = 2.0
#: A sweep goes down to this share of the capacity, so that the next one is not due at once.
_LOW_WATER: Final = 0.9


class Sweeper:
    """Sweeps `root` in a thread: every minute, and when this process has written a sixteenth of the capacity.

    Of all processes that share the path one sweeps at a time (a lock file); file ages are taken from the server's
    clock, by the age of the lock file, so that hosts whose clocks differ do not throw away what is new.
    """

    def __init__(self, root: Path, capacity_bytes: int | None, ttl_s: float | None) -> None:
        self._root = root
        self._capacity = capacity_bytes
        self._ttl_s = ttl_s
        self._written = 0
        self._swept = 0
        self._bytes = 0
        self._closed = False
        self._due = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="cairn-sweep", daemon=True)
        self._thread.start()

    def wrote(self, size: int) -> None:
        """This process has stored so many bytes."""
        if self._capacity is None:
            return
        with self._due:
            self._written += size
            if self._written > self._capacity // 16:
                self._due.notify()

    def sweep(self) -> bool:
        """One sweep; False if another process is at it, or the lock cannot be had."""
        lock = self._root / _LOCK
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.utime(fd)
            self._sweep(os.fstat(fd).st_mtime)
            return True
        except OSError:
            return False
        finally:
            os.close(fd)

    def stats(self) -> Mapping[str, float]:
        return {"swept_objects_total": self._swept, "resident_bytes": self._bytes}

    def close(self) -> None:
        with self._due:
            self._closed = True
            self._due.notify()
        self._thread.join(CLOSE_S)

    def _sweep(self, now: float) -> None:
        files: list[tuple[float, int, str]] = []
        for entry in _written(self._root):
            # Another process may take a file away at any time, and one that cannot be removed (NFS keeps what somebody
            # has open) keeps none of the others.
            with contextlib.suppress(OSError):
                stat = entry.stat()
                if entry.name.startswith(TEMPORARY):
                    if now - stat.st_mtime > DEAD_S:
                        Path(entry.path).unlink()
                elif self._ttl_s is not None and now - stat.st_mtime > self._ttl_s:
                    self._removed(entry.path)
                else:
                    files.append((stat.st_mtime, stat.st_size, entry.path))
            if self._closed:
                return
        total = sum(size for _, size, _ in files)
        if self._capacity is not None and total > self._capacity:
            for _, size, path in sorted(files):
                if total <= self._capacity * _LOW_WATER or self._closed:
                    break
                if self._removed(path):
                    total -= size
        self._bytes = total

    def _removed(self, path: str) -> bool:
        """Whether a file has gone, by this process or another."""
        try:
            Path(path).unlink()
        except OSError as error:
            return isinstance(error, FileNotFoundError)
        self._swept += 1
        return True

    def _run(self) -> None:
        while True:
            with self._due:
                if not self._closed:
                    self._due.wait(INTERVAL_S)
                if self._closed:
                    return
                self._written = 0
            self.sweep()


def _written(root: Path) -> Iterator["os.DirEntry[str]"]:
    """The files of stores: objects, and what is being written; directories that vanish meanwhile are left out."""
    yield from _files(root / _OBJECTS)
    yield from (entry for entry in _entries(root) if entry.name.startswith(TEMPORARY))


def _files(directory: Path) -> Iterator["os.DirEntry[str]"]:
    waiting = [directory]
    while waiting:
        for entry in _entries(waiting.pop()):
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            else:
                yield entry


def _entries(directory: Path) -> Iterator["os.DirEntry[str]"]:
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        yield from entries
