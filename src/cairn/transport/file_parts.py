"""Bytes between parts of memory and files: moved in one call without the GIL, and summed on their way in."""

import errno
import math
import mmap
import os
import time
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, starmap
from typing import Final, NamedTuple

import numpy as np

from cairn.codec.xxh3 import ALIGNMENT, CHECKSUM_BYTES, SHORT, begin, finish, units
from cairn.jit import (
    clock_gettime,
    close_file,
    fence,
    kernel,
    map_file,
    open_file,
    pread,
    preadv2,
    statx,
    unmap,
)
from cairn.transport.moving import PIECE, Extents, Octets, deliver, extents_of

#: Smaller reads are not worth a mapping.
MAPPING: Final = 2 << 20
_VECTOR: Final = 1024
_EINTR, _ETIMEDOUT = errno.EINTR, errno.ETIMEDOUT
_READ_ONLY, _MAPPED = mmap.PROT_READ, mmap.MAP_SHARED | mmap.MAP_POPULATE
_PAGE, _NOWAIT = mmap.PAGESIZE, os.RWF_NOWAIT
#: Not to wait, for ever, for whoever writes to what is a pipe and no file.
_READING, _MONOTONIC = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, time.CLOCK_MONOTONIC
#: Of statx(2): AT_EMPTY_PATH, STATX_MTIME, and the words of its answer, among them the seconds of that.
_OF_DESCRIPTOR, _MODIFIED, _STATUS_WORDS, _MODIFIED_WORD = 0x1000, 0x40, 32, 14


class Read(NamedTuple):
    """Parts (writable) to be filled, one after the other, from a file's bytes from `offset` on.

    sums: of `sums_of`; gets the xxh3-128 of each part that was filled and is not `SHORT`.
    """

    path: str
    offset: int
    parts: Sequence[memoryview]
    sums: Octets | None = None


class Came(NamedTuple):
    """size: how many bytes there were for a read, or a negative errno; changed: when its file was, in Unix seconds."""

    size: int
    changed: int


def read_files(reads: Sequence[Read], deadline: float = math.inf) -> list[Came]:
    """Reads one after the other, all in one call without the GIL: threads that took it for each file would wait for it
    in turns. Reads that have not begun by the deadline (time.monotonic) are ETIMEDOUT."""
    names = [os.fsencode(read.path) + b"\0" for read in reads]
    begins = accumulate((len(name) for name in names), initial=0)
    stops = list(accumulate(len(read.parts) for read in reads))
    ranges = [
        (at, read.offset, stop, read.sums is not None) for at, read, stop in zip(begins, reads, stops, strict=False)
    ]
    places = np.array(ranges, np.int64).reshape(-1, 4)
    extents = extents_of([part for read in reads for part in read.parts])
    sums, came = np.zeros((len(extents), CHECKSUM_BYTES), np.uint8), np.zeros((len(reads), 2), np.int64)
    _read(np.frombuffer(b"".join(names) + b"\0", np.uint8), places, extents, sums, came, deadline)
    for read, stop in zip(reads, stops, strict=True):
        if read.sums is not None:
            read.sums[:] = sums[stop - len(read.parts) : stop]
    return list(starmap(Came, came.tolist()))


def write_parts(fd: int, offset: int, parts: Sequence[memoryview]) -> None:
    """Puts parts, one after the other, into a file from `offset` on. Raises OSError.

    In one call of the system, which then keeps them in huge pages: these are mapped in a tenth of the time.
    """
    rest = [part for part in parts if len(part)]
    while rest:
        done = os.pwritev(fd, rest[:_VECTOR], offset)
        if not done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += done
        while rest and done >= len(rest[0]):
            done -= len(rest.pop(0))
        if done:
            rest[0] = rest[0][done:]


@cache
def rehearse() -> None:
    """Compiles what the first call would otherwise wait for, up to seconds; milliseconds once that was done."""
    read_files([Read(os.devnull, 0, [])])


@kernel
def _read(paths: Octets, places: Extents, extents: Extents, sums: Octets, came: Extents, deadline: float) -> None:
    """Reads files; paths: zero-terminated, the last one empty; places: int64 [reads, 4], for each where in them its
    path is, the offset, where its extents end, whether to sum; came: int64 [reads, 2], as in `Came`."""
    # Handed down as an array: one that a kernel uses no more is freed, whatever addresses of it are still about.
    scratch = np.empty(PIECE + ALIGNMENT, np.uint8)
    first: int = 0
    for i in range(len(places)):
        at, offset, stop, summed = places[i]
        fd = -_ETIMEDOUT if _now() > deadline else _open(paths.ctypes.data + at)
        if fd < 0:
            came[i, 0] = fd
        else:
            came[i, 1] = _changed(fd, paths.ctypes.data + len(paths) - 1)
            if summed:
                came[i, 0] = _read_summed(fd, offset, extents[first:stop], sums[first:stop], scratch)
            else:
                came[i, 0] = _read_plainly(fd, offset, extents[first:stop])
            close_file(fd)
        first = stop
    fence()


@kernel
def _now() -> float:
    """The time, as time.monotonic."""
    now = np.zeros(2, np.int64)
    clock_gettime(_MONOTONIC, now.ctypes.data)
    seconds: float = now[0] + now[1] * 1e-9
    return seconds


@kernel
def _open(path: int) -> int:
    fd: int = -_EINTR
    while fd == -_EINTR:
        fd = open_file(path, _READING)
    return fd


@kernel
def _changed(fd: int, empty: int) -> int:
    """When a file was changed, in Unix seconds; 0 if nobody knows. empty: an address of a path of no characters."""
    status = np.zeros(_STATUS_WORDS, np.int64)
    statx(fd, empty, _OF_DESCRIPTOR, _MODIFIED, status.ctypes.data)
    changed: int = status[_MODIFIED_WORD]
    return changed


@kernel
def _read_plainly(fd: int, offset: int, extents: Extents) -> int:
    total: int = 0
    for i in range(len(extents)):
        done = _pread(fd, extents[i, 0], extents[i, 1], offset + total)
        if done < 0:
            return done
        total += done
        if done < extents[i, 1]:
            break
    return total


@kernel
def _read_summed(fd: int, offset: int, extents: Extents, sums: Octets, buffer: Octets) -> int:
    """Reads by pieces into the buffer, and from there past the caches into the parts; how many bytes, or an errno.

    While a piece is delivered the cache fetches the next one from the system's own memory, so that reading it does not
    wait for that. It needs an address for this and gets a mapping, of which nothing is ever read: a file that others
    cut short, or that cannot be read any more, is what a read says and never a signal.
    """
    scratch = -(-buffer.ctypes.data // ALIGNMENT) * ALIGNMENT
    stop = offset
    for i in range(len(extents)):
        stop += extents[i, 1]
    start = offset // _PAGE * _PAGE
    mapped = _mapped(fd, start, stop, scratch)
    total: int = 0
    done: int = 0
    for i in range(len(extents)):
        size = extents[i, 1]
        ahead = mapped + offset + total - start if mapped else 0
        done = _read_part(fd, offset + total, extents[i, 0], size, sums[i], scratch, ahead, stop)
        if done < 0:
            break
        total += done
        if done < size:
            break
    if mapped:
        unmap(mapped, stop - start)
    return done if done < 0 else total


@kernel
def _read_part(
    fd: int, offset: int, address: int, size: int, digest: Octets, scratch: int, mapped: int, stop: int
) -> int:
    """mapped: an address that stands for `offset`, or 0; stop: where the mapping ends."""
    state = np.empty(8, np.uint64)
    begin(state)
    for at in range(0, size, PIECE):
        want = min(PIECE, size - at)
        done = _pread(fd, scratch, want, offset + at)
        if done < 0:
            return done
        ahead = at + done if mapped and offset + at + done + PIECE <= stop else 0
        deliver(state, scratch, address + at, done, min(at + want, units(size)) - at, ahead and mapped + ahead)
        if done < want:
            return at + done
    if size > SHORT:
        finish(state, address, size, digest)
    return size


@kernel
def _mapped(fd: int, start: int, stop: int, scratch: int) -> int:
    """A mapping of bytes of a file, if they are worth one and its last one does not come from a device; or 0."""
    if stop - start < MAPPING:
        return 0
    vector = np.array([scratch, 1])
    here = preadv2(fd, vector.ctypes.data, 1, stop - 1, _NOWAIT) == vector[1]
    if not here:
        return 0
    address: int = map_file(0, stop - start, _READ_ONLY, _MAPPED, fd, start)
    return max(0, address)


@kernel
def _pread(fd: int, address: int, size: int, offset: int) -> int:
    """Reads at an offset of a file; how many bytes, fewer only at its end, or a negative errno."""
    moved: int = 0
    done: int = 0
    while moved < size:
        done = pread(fd, address + moved, size - moved, offset + moved)
        if done == 0:
            break
        if done > 0:
            moved += done
        elif done != -_EINTR:
            return done
    return moved
