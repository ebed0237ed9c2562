"""Bytes between parts of memory and one buffer: moved in pieces that the cache holds, and summed there.

Both in one kernel, which frees the GIL once: threads that call the system and a checksum for each piece would take it
in turns. What comes in goes through the registers into the checksum and, past the caches, into the parts: that is as
fast as a copy alone, and what is summed is what stands in the caller's memory, whatever the file holds by then.
"""

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from cairn.codec.xxh3 import (
    ALIGNMENT,
    CHECKSUM_BYTES,
    SHORT,
    UNIT,
    Words,
    absorb,
    begin,
    carry,
    finish,
    units,
    xxh3_128,
)
from cairn.copy.memory import move_bytes
from cairn.jit import fence, kernel, prefetch_far

Octets = npt.NDArray[np.uint8]
Extents = npt.NDArray[np.int64]

#: A quarter of a small second-level cache, since two are in it, and so much that a call of the system takes little
#: beside its copy.
PIECE: Final = 128 << 10
_LINE: Final = 64
NOTHING: Final = np.zeros((0, CHECKSUM_BYTES), np.uint8)


def sums_of(parts: Sequence[memoryview]) -> Octets:
    """Where the checksums of parts go, uint8 [parts, 16]: zeros, as what is not summed stays."""
    return np.zeros((len(parts), CHECKSUM_BYTES), np.uint8)


class Scatter:
    """Copies what comes, by any pieces, into parts (writable), one after the other, as far as both go.

    sums: of `sums_of`; gets the xxh3-128 of each part that was filled and is not `SHORT`. The parts must outlive it.
    """

    def __init__(self, parts: Sequence[memoryview], sums: Octets | None = None) -> None:
        self._extents = extents_of(parts)
        self._sums = NOTHING if sums is None else sums
        self._state = np.empty(8, np.uint64)
        self._place = np.zeros(2, np.int64)

    def take(self, data: memoryview | bytes) -> None:
        """Copies the bytes that come next."""
        view = memoryview(data)
        _scatter(_address(view), len(view), self._extents, self._sums, self._state, self._place)


def scatter(data: memoryview, parts: Sequence[memoryview], sums: Octets | None = None) -> None:
    """As `Scatter`, of bytes that have all come."""
    Scatter(parts, sums).take(data)


def gather(parts: Sequence[memoryview], data: memoryview, sums: Octets | None = None) -> None:
    """Copies parts into data (writable), one after the other, as far as both go; `sums` as in `scatter`."""
    _gather(_address(data), len(data), extents_of(parts), NOTHING if sums is None else sums)


def sum_up(parts: Sequence[memoryview], sums: Octets) -> None:
    """Puts the xxh3-128 of each part that is not `SHORT` into `sums` (of `sums_of`): for parts that something else has
    filled just now, while the cache still holds them."""
    _sum_up(extents_of(parts), sums)


class Checksums:
    """The xxh3-128 of parts, made once, by whichever thread comes first. Thread-safe."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = parts
        self._sums = sums_of(parts)
        self._lock = threading.Lock()

    def make(self) -> Octets:
        """uint8 [parts, 16], zeros for those that are `SHORT`; waits for a thread that is at it."""
        with self._lock:
            if self._parts:
                sum_up(self._parts, self._sums)
                self._parts = ()
            return self._sums

    def drop(self) -> None:
        """Gives the parts up: once this returns no thread reads them any more."""
        with self._lock:
            self._parts = ()


@cache
def rehearse() -> None:
    """Compiles what the first call would otherwise wait for, up to seconds; milliseconds once that was done."""
    parts = [memoryview(bytearray(SHORT + 1))]
    scatter(memoryview(bytes(SHORT + 1)), parts, sums_of(parts))
    gather(parts, memoryview(bytearray(SHORT + 1)), sums_of(parts))
    sum_up(parts, sums_of(parts))


def extents_of(parts: Sequence[memoryview]) -> Extents:
    """Addresses and sizes, int64 [parts, 2]."""
    return np.array([(_address(part), len(part)) for part in parts], np.int64).reshape(-1, 2)


def _address(part: memoryview) -> int:
    # What numpy itself tells takes several times as long as either.
    if not len(part):
        return 0
    if part.readonly:
        return _start(np.frombuffer(part, np.uint8))
    return ctypes.addressof(ctypes.c_char.from_buffer(part))


@kernel
def _start(data: Octets) -> int:
    address: int = data.ctypes.data
    return address


@kernel
def _sum_up(extents: Extents, sums: Octets) -> None:
    for i in range(len(extents)):
        if extents[i, 1] > SHORT:
            xxh3_128(extents[i, 0], extents[i, 1], sums[i])


@kernel
def _scatter(data: int, count: int, extents: Extents, sums: Octets, state: Words, place: Extents) -> None:
    """Copies the `count` bytes at an address; state, place: of the part that is next, its number and how much of it is
    there already. A unit that comes in two pieces is summed where it then stands."""
    i, at = place
    while i < len(extents) and count > 0:
        address, size = extents[i]
        summed = i < len(sums) and size > SHORT
        whole = units(size) if summed else 0
        if at == 0:
            begin(state)
        want = min(size - at, PIECE - at % PIECE, count)
        begun = min(want, -at % UNIT)
        move_bytes(address + at, data, begun)
        if begun and (at + begun) % UNIT == 0 and at + begun <= whole:
            absorb(state, address + at + begun - UNIT, UNIT)
        deliver(state, data + begun, address + at + begun, want - begun, whole - at - begun, 0)
        data += want
        count -= want
        at += want
        if at == size:
            if summed:
                finish(state, address, size, sums[i])
            i += 1
            at = 0
    place[0], place[1] = i, at
    fence()


@kernel
def _gather(data: int, count: int, extents: Extents, sums: Octets) -> None:
    """Copies the parts to an address, up to `count` bytes."""
    state = np.empty(8, np.uint64)
    for i in range(len(extents)):
        address, size = extents[i, 0], min(extents[i, 1], count)
        summed = size > SHORT and size == extents[i, 1] and i < len(sums)
        begin(state)
        for at in range(0, size, PIECE):
            want = min(PIECE, size - at)
            deliver(state, address + at, data + at, want, min(at + want, units(size)) - at if summed else 0, 0)
        if summed:
            finish(state, address, size, sums[i])
        data += size
        count -= size
    fence()


@kernel
def deliver(state: Words, source: int, target: int, count: int, whole: int, ahead: int) -> None:
    """Copies `count` bytes, of which up to `whole`, in units, go into the state; ahead: where as many as these come
    from next, or 0."""
    whole = max(0, min(whole, count // UNIT * UNIT))
    if target % ALIGNMENT:
        move_bytes(target, source, whole)
        absorb(state, source, whole)
    elif ahead:
        for at in range(0, whole, UNIT):
            for line in range(0, UNIT, _LINE):
                prefetch_far(ahead + at + line)
            carry(state, source + at, target + at, UNIT)
    else:
        carry(state, source, target, whole)
    move_bytes(target + whole, source + whole, max(0, count - whole))
