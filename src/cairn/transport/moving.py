"""Bytes between parts of memory and one buffer: moved in pieces that the cache holds, and summed there.

Both in one kernel, which frees the GIL once: threads that call the system and a checksum for each piece would take it
in turns. What comes in goes through the registers into the checksum and, past the caches, into the parts: that is as
fast as a copy alone, and what is summed is what stands in the caller's memory, whatever the file holds by then.
"""

import ctypes
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


def scatter(data: memoryview, parts: Sequence[memoryview], sums: Octets | None = None) -> None:
    """Copies data into parts (writable), one after the other, as far as both go.

    sums: of `sums_of`; gets the xxh3-128 of each part that was filled and is not `SHORT`.
    """
    _copy(True, _address(data), len(data), extents_of(parts), NOTHING if sums is None else sums)


def gather(parts: Sequence[memoryview], data: memoryview, sums: Octets | None = None) -> None:
    """Copies parts into data (writable), one after the other, as far as both go; `sums` as in `scatter`."""
    _copy(False, _address(data), len(data), extents_of(parts), NOTHING if sums is None else sums)


def sum_up(parts: Sequence[memoryview], sums: Octets) -> None:
    """Puts the xxh3-128 of each part that is not `SHORT` into `sums` (of `sums_of`): for parts that something else has
    filled just now, while the cache still holds them."""
    _sum_up(extents_of(parts), sums)


@cache
def rehearse() -> None:
    """Compiles what the first call would otherwise wait for, up to seconds; milliseconds once that was done."""
    parts = [memoryview(bytearray(SHORT + 1))]
    scatter(memoryview(bytes(SHORT + 1)), parts, sums_of(parts))
    sum_up(parts, sums_of(parts))


def extents_of(parts: Sequence[memoryview]) -> Extents:
    """Addresses and sizes, int64 [parts, 2]."""
    return np.array([(_address(part), len(part)) for part in parts], np.int64).reshape(-1, 2)


def _address(part: memoryview) -> int:
    if part.readonly or not len(part):
        address: int = np.frombuffer(part, np.uint8).__array_interface__["data"][0] if len(part) else 0
        return address
    return ctypes.addressof(ctypes.c_char.from_buffer(part))  # a third of the time


@kernel
def _sum_up(extents: Extents, sums: Octets) -> None:
    for i in range(len(extents)):
        if extents[i, 1] > SHORT:
            xxh3_128(extents[i, 0], extents[i, 1], sums[i])


@kernel
def _copy(scattering: bool, data: int, count: int, extents: Extents, sums: Octets) -> None:
    """Copies between the parts and the `count` bytes at an address."""
    state = np.empty(8, np.uint64)
    for i in range(len(extents)):
        address, size = extents[i, 0], min(extents[i, 1], count)
        summed = size > SHORT and size == extents[i, 1] and i < len(sums)
        begin(state)
        source, target = (data, address) if scattering else (address, data)
        for at in range(0, size, PIECE):
            want = min(PIECE, size - at)
            deliver(state, source + at, target + at, want, min(at + want, units(size)) - at if summed else 0, 0)
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
