"""Bytes between parts of memory and a file, or one buffer: moved in pieces that the cache holds, and summed there.

Both in one kernel, which frees the GIL once: threads that call the system and a checksum for each piece would take it
in turns. What comes in goes through the registers into the checksum and, past the caches, into the parts: that is as
fast as a copy alone, and what is summed is what stands in the caller's memory, whatever the file holds by then.
"""

import ctypes
import errno
import os
from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from cairn.codec.xxh3 import ALIGNMENT, CHECKSUM_BYTES, SHORT, UNIT, Words, absorb, begin, carry, finish, units
from cairn.copy.memory import fence, move_bytes
from cairn.jit import kernel, pread, pwrite

Octets = npt.NDArray[np.uint8]
Extents = npt.NDArray[np.int64]

#: Half of a small second-level cache, and so much that a call of the system takes little beside its copy.
PIECE: Final = 256 << 10
_READ, _WRITE, _SCATTER, _GATHER = range(4)
_EINTR = errno.EINTR
_NOTHING: Final = np.zeros((0, CHECKSUM_BYTES), np.uint8)


def sums_of(parts: Sequence[memoryview]) -> Octets:
    """Where the checksums of parts go, uint8 [parts, 16]: zeros, as what is not summed stays."""
    return np.zeros((len(parts), CHECKSUM_BYTES), np.uint8)


def read_parts(fd: int, offset: int, parts: Sequence[memoryview], sums: Octets | None = None) -> int:
    """Fills parts (writable), one after the other, from a file's bytes from `offset` on; how many there were.

    sums: of `sums_of`; the xxh3-128 of each part that was filled and is not `SHORT`. Raises OSError.
    """
    return _moved(_READ, fd, offset, parts, sums)


def write_parts(fd: int, offset: int, parts: Sequence[memoryview], sums: Octets | None = None) -> None:
    """Puts parts, one after the other, into a file from `offset` on; `sums` as in `read_parts`.

    Raises OSError.
    """
    if _moved(_WRITE, fd, offset, parts, sums) != sum(len(part) for part in parts):
        raise OSError(errno.ENOSPC, "cut short")


def scatter(data: memoryview, parts: Sequence[memoryview], sums: Octets | None = None) -> None:
    """Copies data into parts, one after the other, as far as both go; `sums` as in `read_parts`."""
    _moved(_SCATTER, _address(data), len(data), parts, sums)


def gather(parts: Sequence[memoryview], data: memoryview, sums: Octets | None = None) -> None:
    """Copies parts into data (writable), one after the other, as far as both go; `sums` as in `read_parts`."""
    _moved(_GATHER, _address(data), len(data), parts, sums)


@cache
def rehearse() -> None:
    """Compiles what the first call would otherwise wait for, up to seconds; milliseconds once that was done."""
    parts = [memoryview(bytearray(SHORT + 1))]
    scatter(memoryview(bytes(SHORT + 1)), parts, sums_of(parts))


def _moved(way: int, place: int, offset: int, parts: Sequence[memoryview], sums: Octets | None) -> int:
    extents = np.array([(_address(part), len(part)) for part in parts], np.int64).reshape(-1, 2)
    done = _move(way, place, offset, extents, _NOTHING if sums is None else sums)
    if done < 0:
        raise OSError(-done, os.strerror(-done))
    return done


def _address(part: memoryview) -> int:
    if part.readonly or not len(part):
        address: int = np.frombuffer(part, np.uint8).__array_interface__["data"][0] if len(part) else 0
        return address
    return ctypes.addressof(ctypes.c_char.from_buffer(part))  # a third of the time


@kernel
def _move(way: int, place: int, offset: int, extents: Extents, sums: Octets) -> int:
    """Moves the parts; how many bytes, fewer if there are no more, or a negative errno.

    place: a file descriptor and `offset` into the file; or, for a copy, the address of `offset` bytes in all.
    """
    buffer = np.empty(PIECE + ALIGNMENT if way == _READ else 0, np.uint8)
    scratch = -(-buffer.ctypes.data // ALIGNMENT) * ALIGNMENT
    state = np.empty(8, np.uint64)
    total: int = 0
    done: int = 0
    for i in range(len(extents)):
        address, size = extents[i, 0], extents[i, 1]
        summed = i < len(sums)
        begin(state)
        for start in range(0, size, PIECE):
            want = min(PIECE, size - start)
            whole = max(0, min(start + want, units(size)) - start) if summed else 0
            if way == _SCATTER:
                done = min(want, offset - total)
                _deliver(state, place + total, address + start, done, whole)
            elif way == _GATHER:
                done = min(want, offset - total)
                _deliver(state, address + start, place + total, done, whole)
            elif way == _READ and summed:
                done = _transfer(way, place, scratch, want, offset + total)
                _deliver(state, scratch, address + start, done, whole)
            else:
                absorb(state, address + start, whole)
                done = _transfer(way, place, address + start, want, offset + total)
            if done < 0:
                return done
            total += done
            if done < want:
                fence()
                return total
        if summed and size > SHORT:
            finish(state, address, size, sums[i])
    fence()
    return total


@kernel
def _deliver(state: Words, source: int, target: int, count: int, whole: int) -> None:
    """Copies `count` bytes, of which up to `whole`, in units, go into the state."""
    whole = max(0, min(whole, count // UNIT * UNIT))
    if target % ALIGNMENT == 0:
        carry(state, source, target, whole)
    else:
        move_bytes(target, source, whole)
        absorb(state, source, whole)
    move_bytes(target + whole, source + whole, max(0, count - whole))


@kernel
def _transfer(way: int, fd: int, address: int, size: int, offset: int) -> int:
    """Reads or writes at an offset of a file; how many bytes, fewer only at its end, or a negative errno."""
    moved: int = 0
    done: int = 0
    while moved < size:
        if way == _READ:
            done = pread(fd, address + moved, size - moved, offset + moved)
        else:
            done = pwrite(fd, address + moved, size - moved, offset + moved)
        if done == 0:
            break
        if done > 0:
            moved += done
        elif done != -_EINTR:
            return done
    return moved
