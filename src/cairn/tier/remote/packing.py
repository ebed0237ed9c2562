"""Objects: which blocks of a chain go into one, what it is called, and how its bytes are laid out.

A chain is cut at fixed places, every `blocks` blocks. An object holds blocks from such a place on, up to the next one
or, at the end of what was stored, fewer; it is called after the key of its last block. A key commits to all tokens
before it and to the namespace, so a name says all of an object's content: any process finds it by the keys it has, with
no directory, and writing it twice writes the same.

    offset            bytes
    0                 512         sealed header (`cairn.codec.seal`): where each block's bytes are
    512 + 512 i       512         frame of block i (`cairn.codec.frame`): its key, shape, codec, lengths, checksum
    ...                           zeros up to a multiple of 4096
    offsets[i]        sizes[i]    stored bytes of block i

Everything before the blocks' bytes is the head. Its size follows from the number of blocks, so head and blocks, or some
of them, can be read at once.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from cairn.codec.base import Octets
from cairn.codec.frame import FrameHeader, Framer, checksum_of
from cairn.codec.seal import seal, unseal
from cairn.kv import Keys
from cairn.observe.reasons import Reason

MAGIC: Final = b"CAIRN\x00OB"
VERSION: Final = 1

_HEADER_BYTES: Final = 512
_FRAME_BYTES: Final = 512
_PAGE: Final = 4096
#: More would not fit the header.
BLOCKS_LIMIT: Final = 32


class Span(NamedTuple):
    """Blocks start..stop of a chain: those of one object, or some of them."""

    start: int
    stop: int


class Index(msgspec.Struct, frozen=True, array_like=True):
    """The body of an object's header (msgpack array). offsets, sizes: of each block's stored bytes."""

    offsets: list[int]
    sizes: list[int]


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

    def head_bytes(self, count: int) -> int:
        """Size of the head of an object of `count` blocks."""
        return -(-(_HEADER_BYTES + count * _FRAME_BYTES) // _PAGE) * _PAGE

    def object_bytes(self, count: int) -> int:
        return self.head_bytes(count) + count * self.block_bytes

    def offset(self, count: int, block: int) -> int:
        """Where block `block` of an object of `count` begins."""
        return self.head_bytes(count) + block * self.block_bytes

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """Blocks start..stop, cut where objects begin."""
        while start < stop:
            end = min(stop, start // self.blocks * self.blocks + self.blocks)
            yield Span(start, end)
            start = end

    def head(self, keys: Keys, namespace: bytes, stored: Sequence[Octets]) -> memoryview:
        """The head of an object with these blocks: keys [n, 2], stored [n] as the codec has made them."""
        head = bytearray(self.head_bytes(len(stored)))
        offsets = [self.offset(len(stored), i) for i in range(len(stored))]
        index = Index(offsets, [self.block_bytes] * len(stored))
        head[:_HEADER_BYTES] = seal(MAGIC, VERSION, msgspec.msgpack.encode(index), _HEADER_BYTES)
        for i, block in enumerate(stored):
            at = _HEADER_BYTES + i * _FRAME_BYTES
            head[at : at + _FRAME_BYTES] = self.framer.pack(
                keys[i].tobytes(), namespace, block, size=_FRAME_BYTES, checksum=checksum_of(block)
            )
        return memoryview(head)

    def prove_head(self, head: memoryview, count: int) -> Reason | None:
        """Whether `head` begins an object of `count` blocks of this kind."""
        body = unseal(MAGIC, VERSION, head[:_HEADER_BYTES])
        if isinstance(body, Reason):
            return body
        try:
            index = _DECODER.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return Reason.CORRUPT
        same = index.offsets == [self.offset(count, i) for i in range(count)]
        return None if same and index.sizes == [self.block_bytes] * count else Reason.FOREIGN

    def prove(self, head: memoryview, block: int, key: bytes, row: Octets) -> Reason | None:
        """Whether `row` holds the object's block `block`, and that is the block `key`."""
        at = _HEADER_BYTES + block * _FRAME_BYTES
        header = self.framer.expect(head[at : at + _FRAME_BYTES], key)
        if not isinstance(header, FrameHeader):
            return header
        stored = row[: self.block_bytes]
        sound = header.verifies(stored) and self.framer.codec.decode(stored, stored)
        return None if sound else Reason.CORRUPT

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


_DECODER: Final = msgspec.msgpack.Decoder(Index)
