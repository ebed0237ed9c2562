"""msgpack read in kernels: the few kinds that plain events are made of. Everything is bounded by the bytes at hand.

A reader takes the address of a value and that where the bytes end, and returns what the value is and where it ends;
NONE for the latter says that it is something else, or cut off. Addresses instead of arrays, because numba counts an
array's references at every call, which took three times as long as the reading. `padded` makes room behind the end, so
that eight bytes can be loaded wherever one may.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, NamedTuple, Self

import msgspec
import numpy as np
import numpy.typing as npt

from cairn.index.slots import NONE
from cairn.jit import kernel, load_big, load_byte, load_word, store_half

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int64]

NIL = 0xC0
PADDING = 32
_NOTHING = np.uint64(0)
_1, _2, _8, _24, _32, _48, _64 = (np.uint64(n) for n in (1, 2, 8, 24, 32, 48, 64))
_206, _255 = np.uint64(0xCE), np.uint64(0xFF)

_FIXED = np.zeros(256, np.int64)
"""Bytes of a scalar without a length of its own, by its first byte; 0: no such scalar."""
_FIXED[:0x80] = _FIXED[0xE0:] = _FIXED[[0xC0, 0xC2, 0xC3]] = 1
_FIXED[[0xCC, 0xD0]] = 2
_FIXED[[0xCD, 0xD1]] = 3
_FIXED[[0xCA, 0xCE, 0xD2]] = 5
_FIXED[[0xCB, 0xCF, 0xD3]] = 9

_STEP = np.zeros(256, np.int64)
"""Bytes of an unsigned integer below 2**32; 0: it is none. Beside it: how far the four bytes behind are shifted."""
_STEP[:0x80], _STEP[0xCC], _STEP[0xCD], _STEP[0xCE] = 1, 2, 3, 5
_SHIFT = np.zeros(256, np.uint64)
_SHIFT[:0x80], _SHIFT[0xCC], _SHIFT[0xCD] = 32, 24, 16
_ITSELF = np.where(np.arange(256) < 0x80, np.arange(256), 0).astype(np.uint64)


#: Below this many bytes a list of ints is faster than the kernel's call.
_FEW = 256

_decode_few = msgspec.msgpack.Decoder(list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]]).decode


def padded(parts: Sequence[bytes]) -> bytes:
    """All bytes in a row, with PADDING bytes behind that are not theirs."""
    return b"".join([*parts, bytes(PADDING)])


def in_a_row(parts: Sequence[bytes]) -> Bytes:
    """All bytes and the padding as memory that may be written to, as an inbox's: kernels are compiled for that."""
    return np.frombuffer(bytearray(padded(parts)), np.uint8)


class Payloads(NamedTuple):
    """Payload i stands at spans[i, 0]:spans[i, 1] of `memory`, which goes on for PADDING bytes behind the last."""

    memory: Bytes
    spans: Words

    @classmethod
    def of(cls, parts: Sequence[bytes]) -> Self:
        ends = np.fromiter(accumulate(map(len, parts)), np.int64, len(parts))
        return cls(in_a_row(parts), np.stack([ends - [*map(len, parts)], ends], axis=1))

    @property
    def sizes(self) -> Words:
        """Of each, in bytes."""
        return self.spans[:, 1] - self.spans[:, 0]

    def one(self, i: int) -> bytes:
        first, stop = self.spans[i].tolist()
        return self.memory[first:stop].tobytes()

    def part(self, first: int, stop: int) -> Self:
        """Those from first to stop."""
        return self._replace(spans=self.spans[first:stop])


@kernel
def read_unsigned(at: int, end: int) -> tuple[np.uint64, int]:
    """An integer 0..2**64-1 in one of the unsigned forms."""
    if at >= end:
        return _NOTHING, NONE
    kind = load_byte(at)
    if kind < 0x80:
        return np.uint64(kind), at + 1
    if 0xCC <= kind <= 0xCF:
        count = 1 << (kind - 0xCC)
        if at + count < end:
            return load_big(at + 1) >> (_64 - _8 * np.uint64(count)), at + 1 + count
    return _NOTHING, NONE


@kernel
def read_array(at: int, end: int) -> tuple[int, int]:
    """How many items an array has; no more than the bytes behind may hold."""
    return _read_header(at, end, 0x90, 0xDC)


@kernel
def read_map(at: int, end: int) -> tuple[int, int]:
    """How many pairs a map has; no more than the bytes behind may hold items."""
    return _read_header(at, end, 0x80, 0xDE)


@kernel
def _read_header(at: int, end: int, short: int, long: int) -> tuple[int, int]:
    if at >= end:
        return 0, NONE
    kind = load_byte(at)
    if kind & 0xF0 == short:
        count, at = kind & 0x0F, at + 1
    elif kind == long:
        count, at = int(np.int64(load_big(at) << _8 >> np.uint64(48))), at + 3
    elif kind == long + 1:
        count, at = int(np.int64(load_big(at) << _8 >> _32)), at + 5
    else:
        return 0, NONE
    return (count, at) if count <= end - at else (0, NONE)


@kernel
def read_text(at: int, end: int) -> tuple[int, int]:
    """A string of less than 256 bytes: where its bytes begin."""
    if at < end:
        kind = load_byte(at)
        if kind & 0xE0 == 0xA0 and at + (kind & 0x1F) < end:
            return at + 1, at + 1 + (kind & 0x1F)
        if kind == 0xD9:
            start = at + 2
            stop = start + load_byte(at + 1)
            if stop <= end:
                return start, stop
    return NONE, NONE


@kernel
def skip_scalar(at: int, end: int) -> int:
    """Where a scalar ends that is neither a long string nor bytes."""
    if at >= end:
        return NONE
    size = int(_FIXED[load_byte(at)])
    if size:
        return at + size if at + size <= end else NONE
    return read_text(at, end)[1]


@kernel
def skip(at: int, end: int) -> int:
    """Where anything ends. Costs no stack: what counts is how many items are still to come."""
    left = 1
    while left:
        if at >= end:
            return NONE
        left -= 1
        kind = load_byte(at)
        size = int(_FIXED[kind])
        if size:
            at += size
        elif kind & 0xF0 == 0x90 or kind == 0xDC or kind == 0xDD:
            count, at = read_array(at, end)
            left += count
        elif kind & 0xF0 == 0x80 or kind == 0xDE or kind == 0xDF:
            count, at = read_map(at, end)
            left += 2 * count
        elif kind & 0xE0 == 0xA0:
            at += 1 + (kind & 0x1F)
        elif 0xD4 <= kind <= 0xD8:
            at += 2 + (1 << (kind - 0xD4))
        elif kind == 0xC1:
            return NONE
        else:  # 8, 16 or 32 bits of length: bytes (C4), extension with its kind (C7), string (D9)
            first = 0xC4 if kind < 0xC7 else 0xC7 if kind < 0xCA else 0xD9
            width = 1 << (kind - first)
            length = int(np.int64(load_big(at + 1) >> (_64 - _8 * np.uint64(width))))
            at += 1 + width + length + (1 if first == 0xC7 else 0)
        if at == NONE or at > end:
            return NONE
    return at


@kernel
def unpack(at: int, end: int, target: int, count: int) -> int:
    """Reads `count` unsigned integers below 2**32 to uint32 memory at `target`; where they end, or NONE.

    Ids of two and of four bytes follow each other at random, so the way must not branch on which it is. Two of them are
    read from one word: to find where the next begins is all that the way waits for.
    """
    i = 0
    while i < count:
        if at >= end:
            return NONE
        word = load_word(at)
        longer = word & _2  # 0xCD: two bytes follow; 0xCE: four
        kind = word & _255
        second = word >> (_24 + longer * _8) & _255
        if i + 1 < count and ((kind + _1) ^ _206 | (second + _1) ^ _206) < _2:
            middle = at + 3 + int(np.int64(longer))
            store_half(target + 4 * i, np.uint32(load_big(at) << _8 >> (_48 - longer * _8)))
            longer = second & _2
            store_half(target + 4 * i + 4, np.uint32(load_big(middle) << _8 >> (_48 - longer * _8)))
            at = middle + 3 + int(np.int64(longer))
            i += 2
            continue
        step = int(_STEP[kind])
        if not step:
            return NONE
        store_half(target + 4 * i, np.uint32((load_big(at) << _8 >> _32) >> _SHIFT[kind] | _ITSELF[kind]))
        at += step
        i += 1
    return at if at <= end else NONE


def parse_tokens(raw: msgspec.Raw) -> Sequence[int] | None:
    """The token ids of a msgpack array of integers 0..2**32-1, or None if it is none: a list, or a view of uint32
    memory of its own. Takes at most 4 bytes of memory for each byte of `raw` once that is beyond a few hundred.
    """
    if len(memoryview(raw)) < _FEW:
        try:
            return _decode_few(raw)
        except msgspec.DecodeError:
            return None
    packed = np.frombuffer(padded([bytes(raw)]), np.uint8)
    count = _count(packed)
    tokens = np.empty(max(0, count), np.uint32)
    return tokens.data if count != NONE and _whole(packed, tokens) else None


@kernel
def _count(packed: Bytes) -> int:
    """How many items the array has, or NONE."""
    start = int(np.int64(packed.ctypes.data))
    count, at = read_array(start, start + len(packed) - PADDING)
    return count if at != NONE else NONE


@kernel
def _whole(packed: Bytes, tokens: npt.NDArray[np.uint32]) -> bool:
    """Unpacks the array, which must end with the last of the bytes; False if it does not."""
    start = int(np.int64(packed.ctypes.data))
    end = start + len(packed) - PADDING
    _, at = read_array(start, end)
    return unpack(at, end, int(np.int64(tokens.ctypes.data)), len(tokens)) == end
