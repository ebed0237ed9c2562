"""The object frame: what every KV block below DRAM carries, so that no reader has to trust where it found it.

An object is a sealed header (`cairn.codec.seal`) and the stored bytes. The header says which block this is, of which
shape, by which codec, how long and with which checksum (XXH3, Yann Collet; 128 bits cost no more time than 64). Reading
compares the header with what the reader asked for and the checksum with what it got; anything else is a miss. Checksums
find accidents; against a malicious writer the storage itself must be protected.
"""

from typing import Final

import msgspec
import numpy as np
import xxhash

from cairn.codec.base import Codec, Octets
from cairn.codec.seal import seal, unseal
from cairn.codec.xxh3 import CHECKSUM_BYTES, SHORT, xxh3_128
from cairn.kv import KVGeometry
from cairn.kv.keys import KEY_BYTES
from cairn.kv.namespace import DIGEST_BYTES
from cairn.observe.reasons import Reason

MAGIC: Final = b"CAIRN\x00KV"
VERSION: Final = 1


class Shard(msgspec.Struct, frozen=True, array_like=True):
    """Which part of the model the bytes belong to: tensor-parallel rank `rank` of `of`."""

    rank: int = 0
    of: int = 1


WHOLE: Final = Shard()


class FrameHeader(msgspec.Struct, frozen=True, array_like=True):
    """The body of the header (msgpack array). New fields go last, with defaults; a changed meaning is a new VERSION.

    key, namespace: 16 bytes each. parameters: the codec's. raw_bytes, stored_bytes: lengths before and after the codec.
    checksum: xxh3-128 of the stored bytes, 16 bytes, canonical (big-endian) order; where an object's blocks can be read
    by themselves, that of each, one after the other.
    """

    key: bytes
    namespace: bytes
    geometry: KVGeometry
    shard: Shard
    codec: str
    parameters: bytes
    raw_bytes: int
    stored_bytes: int
    checksum: bytes

    def verifies(self, stored: Octets) -> bool:
        """Whether these are the bytes that the header was made for."""
        return len(stored) == self.stored_bytes and checksum_of(stored) == self.checksum


def checksum_of(stored: Octets | memoryview) -> bytes:
    """The checksum that a frame holds of its stored bytes (contiguous). Frees the GIL while it sums."""
    data = np.frombuffer(stored, np.uint8)
    if len(data) <= SHORT:
        return xxhash.xxh3_128_digest(data.data)
    digest = np.empty(CHECKSUM_BYTES, np.uint8)
    xxh3_128(data.ctypes.data, len(data), digest)
    return digest.tobytes()


class Framer:
    """Makes and reads the headers of one kind of object: one geometry, shard and codec. Thread-safe (immutable)."""

    def __init__(self, codec: Codec, shard: Shard = WHOLE) -> None:
        self.codec = codec
        self.shard = shard
        self._stored_limit = codec.stored_bytes_limit()

    def pack(
        self,
        key: bytes,
        namespace: bytes,
        stored_bytes: int,
        checksum: bytes,
        *,
        size: int | None = None,
        blocks: int = 1,
    ) -> bytes:
        """The header for so many stored bytes with this checksum, zero-padded to `size` bytes if given.

        blocks: how many they hold, the last of which is `key`.
        """
        header = FrameHeader(
            key=key,
            namespace=namespace,
            geometry=self.codec.geometry,
            shard=self.shard,
            codec=self.codec.id,
            parameters=self.codec.parameters,
            raw_bytes=blocks * self.codec.geometry.block_bytes,
            stored_bytes=stored_bytes,
            checksum=checksum,
        )
        return seal(MAGIC, VERSION, msgspec.msgpack.encode(header), size)

    def expect(self, data: memoryview, key: bytes, blocks: int = 1) -> FrameHeader | Reason:
        """The header at the start of `data` if it is that of `key` and of this kind, and of so many blocks; else
        CORRUPT or FOREIGN."""
        header = parse(data)
        if isinstance(header, Reason):
            return header
        wanted = (key, self.codec.geometry, self.shard, self.codec.id, self.codec.parameters)
        if (header.key, header.geometry, header.shard, header.codec, header.parameters) != wanted:
            return Reason.FOREIGN
        limit = self._stored_limit if blocks == 1 else self.codec.stored_bytes_limit(blocks)
        if header.raw_bytes != blocks * self.codec.geometry.block_bytes or header.stored_bytes > limit:
            return Reason.CORRUPT
        return header


def parse(data: memoryview) -> FrameHeader | Reason:
    """The header at the start of `data`, whatever it is of; CORRUPT or FOREIGN (another version) otherwise.

    Never raises, and takes no memory beyond `HEADER_LIMIT` bytes. Lengths are the writer's word: bound them before use.
    """
    body = unseal(MAGIC, VERSION, data)
    if isinstance(body, Reason):
        return body
    try:
        header = _DECODER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Reason.CORRUPT
    sound = len(header.key) == KEY_BYTES and len(header.namespace) == DIGEST_BYTES and header.checksum
    return header if sound and header.raw_bytes >= 0 and header.stored_bytes >= 0 else Reason.CORRUPT


_DECODER: Final = msgspec.msgpack.Decoder(FrameHeader)
