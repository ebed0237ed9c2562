"""Objects: which blocks of a chain go into one, what it is called, and how its bytes are laid out.

A chain is cut at fixed places, every `blocks` blocks. An object holds blocks from such a place on, up to the next one
or, at the end of what was stored, fewer; it is called after the key of its last block. A key commits to all tokens
before it and to the namespace, so a name says all of an object's content: any process finds it by the keys it has, with
no directory, and writing it twice writes the same.

    offset      bytes
    i size      size        stored bytes of block i
    n size      4096        frame (`cairn.codec.frame`) of all n: key of the last one, shape, and a checksum of each

Since a key commits to those before it, one proves them all. The frame is the tail, so that whoever writes sums blocks
as they go by, and a file system finds them aligned; the last blocks, or all, can be read with it at once.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

import msgspec

from cairn.codec.base import Octets
from cairn.codec.frame import FrameHeader, Framer, checksum_of
from cairn.codec.seal import HEADER_LIMIT, amend
from cairn.codec.xxh3 import CHECKSUM_BYTES
from cairn.observe.reasons import Reason

VERSION: Final = 2
TAIL_BYTES: Final = HEADER_LIMIT
#: More do not make anything faster.
BLOCKS_LIMIT: Final = 32
_UNMADE: Final = bytes(CHECKSUM_BYTES)


class Span(NamedTuple):
    """Blocks start..stop of a chain: those of one object, or some of them."""

    start: int
    stop: int


class Packing:
    """How blocks of one kind (geometry, shard, codec) are packed, `blocks` to an object. Thread-safe (immutable).

    family: that of the codecs, where objects are streams (`cairn.tier.remote.streams`), which are named and cut alike.
    """

    def __init__(self, framer: Framer, blocks: int, family: str = "") -> None:
        self.framer = framer
        self.family = family
        self.blocks = blocks
        self.block_bytes = framer.codec.geometry.block_bytes
        self._kind = self._digest()

    def name(self, key: bytes) -> bytes:
        """What the object is called whose last block has this key [16 bytes]."""
        return b"cairn/%s/%s" % (self._kind, key.hex().encode())

    def object_bytes(self, count: int) -> int:
        return count * self.block_bytes + TAIL_BYTES

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """Blocks start..stop, cut where objects begin."""
        while start < stop:
            end = min(stop, start // self.blocks * self.blocks + self.blocks)
            yield Span(start, end)
            start = end

    def tail(self, key: bytes, namespace: bytes, blocks: Sequence[Octets]) -> Callable[[Octets], memoryview]:
        """Makes the tail of an object of these blocks, as the codec has made them, the last of which is `key`.

        It is all there but for the checksums: once the blocks' bytes have taken the cache, making it costs four times
        as much. What is returned puts those in: uint8 [blocks, 16], where zeros stand for what is still to be summed.
        """
        size, unmade = sum(len(block) for block in blocks), bytes(CHECKSUM_BYTES * len(blocks))
        page = self.framer.pack(key, namespace, size, unmade, size=TAIL_BYTES, blocks=len(blocks))
        return partial(_finished, bytearray(page), blocks)

    def prove_tail(self, tail: memoryview, key: bytes, count: int) -> bytes | Reason:
        """The blocks' checksums, one after the other, if `tail` ends the object of `count` blocks up to `key`."""
        header = self.framer.expect(tail, key, count)
        if not isinstance(header, FrameHeader):
            return header
        sound = header.stored_bytes == count * self.block_bytes and len(header.checksum) == count * CHECKSUM_BYTES
        return header.checksum if sound else Reason.CORRUPT

    def prove(self, blocks: Sequence[Octets], sums: Octets, expected: bytes) -> list[Reason | None]:
        """Whether these are the blocks with the `expected` checksums, and if so puts them into the rows' layout; sums:
        as in `tail`."""
        made, decode = _completed(sums, blocks), self.framer.codec.decode
        return [
            None
            if made[at : at + CHECKSUM_BYTES] == expected[at : at + CHECKSUM_BYTES] and decode(block, block)
            else Reason.CORRUPT
            for at, block in zip(range(0, len(expected), CHECKSUM_BYTES), blocks, strict=True)
        ]

    def _digest(self) -> bytes:
        """Of all that makes objects of another kind unreadable, so that they are not even found."""
        codec = self.framer.codec
        fields = (VERSION, codec.geometry, self.framer.shard, codec.id, codec.parameters, self.blocks)
        told = (*fields, self.family) if self.family else fields
        return hashlib.blake2s(msgspec.msgpack.encode(told), digest_size=8, person=b"cairn/ob").hexdigest().encode()


def blocks_of(object_bytes: int, block_bytes: int) -> int:
    """How many blocks make an object of about `object_bytes`: a power of two, so that processes easily agree."""
    count = max(1, min(BLOCKS_LIMIT, object_bytes // block_bytes))
    return 1 << (count.bit_length() - 1)


def _finished(page: bytearray, blocks: Sequence[Octets], sums: Octets) -> memoryview:
    # The checksums are the last field of a header (`FrameHeader`).
    amend(page, _completed(sums, blocks))
    return memoryview(page)


def _completed(sums: Octets, blocks: Sequence[Octets]) -> bytes:
    """The checksums of blocks, one after the other: `sums`, uint8 [blocks, 16], and where these are zeros made now."""
    made = sums.tobytes()
    if _UNMADE not in made:
        return made
    parts = [made[at : at + CHECKSUM_BYTES] for at in range(0, len(made), CHECKSUM_BYTES)]
    return b"".join(checksum_of(block) if part == _UNMADE else part for part, block in zip(parts, blocks, strict=True))
