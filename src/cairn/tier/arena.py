"""Arenas: host memory for KV blocks in fixed slots, faulted in once; private to a process or shared by name."""

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from cairn.errors import StorageError

PAGE = 4096
_POPULATE_READ, _POPULATE_WRITE = 22, 23  # MADV_POPULATE_..., Linux 5.14: faults pages in without touching each
_SHARED_HOME = Path("/dev/shm")


class Arena:
    """Page-aligned memory, uint8 [slots, stride], faulted in once.

    The first touch of memory costs more than a copy (0.6-1.3 GB/s here), so it is paid at start-up and not by a
    request. Owns its mapping as long as it lives; rows are handed out as views. Raises StorageError when the system has
    not that much.
    """

    def __init__(self, slots: int, stride: int) -> None:
        size = slots * stride
        try:
            self._map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise _refused(size, error) from None
        self._adopt(slots, stride)

    @classmethod
    def shared(cls, name: str, slots: int, stride: int) -> Self:
        """The arena that processes of one user share under `name`: made by whoever comes first, mapped by the others.

        All must ask for the same size. It lives until nobody maps it any more, once `unlink` has taken its name away.
        """
        size = slots * stride
        descriptor = os.open(_home(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_size != size:
                # Takes the pages now: a full /dev/shm is an error here, and not a SIGBUS at the first touch.
                os.posix_fallocate(descriptor, 0, size)
            # By hand, because the map keeps a duplicate of the descriptor, and with it the lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            arena = cls.__new__(cls)
            arena._map = mmap.mmap(descriptor, size, mmap.MAP_SHARED)
        except OSError as error:
            cls.unlink(name)
            raise _refused(size, error) from None
        finally:
            os.close(descriptor)
        arena._adopt(slots, stride)
        return arena

    @classmethod
    def attach(cls, name: str, slots: int, stride: int, *, writable: bool = True) -> Self:
        """The shared arena that somebody has made, while others may be at work in it.

        Raises StorageError if there is none of that size.
        """
        size = slots * stride
        try:
            descriptor = os.open(_home(name), os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"arena {name}: cannot be opened ({error.strerror}); is its owner alive?") from None
        try:
            found = os.fstat(descriptor).st_size
            if found != size:
                raise StorageError(f"arena {name}: has {found} bytes, not {size}")
            arena = cls.__new__(cls)
            arena._map = mmap.mmap(descriptor, size, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        except (OSError, OverflowError) as error:
            raise error if isinstance(error, StorageError) else _refused(size, error) from None
        finally:
            os.close(descriptor)
        # Read, never written: a byte written back might be a neighbour's by now.
        arena._adopt(slots, stride, _POPULATE_READ)
        return arena

    @staticmethod
    def unlink(name: str) -> None:
        """Takes a shared arena's name away: nobody can map it anew, and it goes with its last mapping. Idempotent."""
        _home(name).unlink(missing_ok=True)

    def _adopt(self, slots: int, stride: int, populate: int = _POPULATE_WRITE) -> None:
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8).reshape(slots, stride)
        try:
            self._map.madvise(populate)
        except OSError:
            if populate == _POPULATE_READ:
                return  # an old kernel: pages are mapped as they are touched
            # Not a store of zeros: another process may have written its blocks already.
            self.memory.reshape(-1)[::PAGE] |= 0


def _home(name: str) -> Path:
    return _SHARED_HOME / f"cairn-{name}"


def _refused(size: int, error: Exception) -> StorageError:
    hint = "lower storage.cpu.size"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        hint += f" or make {_SHARED_HOME} larger (docker run --ipc=host or --shm-size)"
    return StorageError(f"arena of {size} bytes: the system refuses it ({error}); {hint}")
