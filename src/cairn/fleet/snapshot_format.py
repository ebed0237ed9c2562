"""A snapshot's bytes, in a file or in a store of chunks: a sealed header (`cairn.codec.seal`), then records.

    1   kind
    4   length of the payload, u32le
    n   payload
    16  xxh3-128 of everything so far, the header and this record's kind, length and payload included

So each record proves itself and all before it, in one pass and bounded memory. Kinds: SOURCE (msgpack `SourceHead`),
then BLOCKS of that source (columns: names u64le, keys 2 x u64le, tiers u8), then KEPT (how many, u64le) or VOID (the
source was dropped meanwhile); at the very end END (sources kept, u64le). Nothing in it is an index into anything:
whoever reads stores the blocks anew.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import numpy as np
import xxhash

from cairn.codec.seal import HEADER_LIMIT, seal, unseal
from cairn.errors import StorageError
from cairn.fleet.base import Source, Tier
from cairn.fleet.chains import keys_with_extra, root_of
from cairn.fleet.copying import PIECE, Piece
from cairn.fleet.metrics import WarmStarted
from cairn.fleet.positions import Position
from cairn.fleet.separation import extra_digest, namespace_digest
from cairn.observe.reasons import Reason

MAGIC: Final = b"CAIRNFLT"
VERSION: Final = 1
SOURCE, BLOCKS, KEPT, VOID, END = 1, 2, 3, 4, 5

#: Bytes of a block; and of a record's payload at most.
BLOCK_BYTES: Final = 8 + 16 + 1
_LONGEST: Final = PIECE * BLOCK_BYTES
_PREAMBLE, _SIZE_AT = 24, slice(10, 12)

Read = Callable[[int], bytes]
Write = Callable[[Any], object]


class SpoiledError(Exception):
    """Not a snapshot that can be used, for this reason."""

    def __init__(self, reason: WarmStarted) -> None:
        self.reason = reason


class Header(msgspec.Struct, frozen=True, array_like=True):
    """scheme: of keys and digests, see `scheme`. time: of the writing, seconds since the epoch. capacity,
    worker_blocks: the limits of the index that was written; one with others takes in what fits.
    """

    scheme: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    time: float
    capacity: int
    worker_blocks: int


class SourceHead(msgspec.Struct, frozen=True, array_like=True):
    """names: how many blocks follow at most."""

    instance: Annotated[str, msgspec.Meta(max_length=1 << 16)]
    rank: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    sizes: Annotated[tuple[Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)], ...], msgspec.Meta(max_length=8)]
    names: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    position: Position | None

    @property
    def source(self) -> Source:
        return Source(self.instance, self.rank)


class Record(NamedTuple):
    kind: int
    payload: bytes


def scheme() -> bytes:
    """16 bytes that differ where keys are made otherwise: of a key, and of the digests that chains begin with."""
    rows, extra = np.arange(8, dtype=np.uint32).reshape(2, 4), (None, extra_digest(["content"]))
    keys = keys_with_extra(root_of(namespace_digest("lora", "salt")), rows, extra)
    return bytes(xxhash.xxh3_128(keys.tobytes() + bytes(Tier)).digest())


class RecordWriter:
    """Writes a snapshot's bytes. For one thread."""

    def __init__(self, write: Write, header: Header) -> None:
        self._write = write
        self._sum = xxhash.xxh3_128()
        self._put(seal(MAGIC, VERSION, msgspec.msgpack.encode(header)))

    def source(self, head: SourceHead) -> None:
        self.record(SOURCE, msgspec.msgpack.encode(head))

    def blocks(self, piece: Piece) -> None:
        hashes, keys = piece.hashes.astype("<u8", copy=False), piece.keys.astype("<u8", copy=False)
        self.record(BLOCKS, hashes.tobytes(), keys.tobytes(), piece.tiers.tobytes())

    def record(self, kind: int, *parts: bytes) -> None:
        self._put(bytes([kind]) + sum(map(len, parts)).to_bytes(4, "little"))
        for part in parts:
            self._put(part)
        self._write(self._sum.digest())

    def _put(self, data: bytes) -> None:
        self._sum.update(data)
        self._write(data)


def records(read: Read) -> Iterator[Record]:
    """The records behind a header that was found good, each proved before it is given, up to END, behind which there
    must be nothing. read(n): up to n bytes, fewer only at the end. Raises SpoiledError.
    """
    summed = xxhash.xxh3_128()
    start = _exactly(read, _PREAMBLE)
    if not start.startswith(MAGIC):
        raise SpoiledError(WarmStarted.FOREIGN)
    size = int.from_bytes(start[_SIZE_AT], "little")
    if not _PREAMBLE <= size <= HEADER_LIMIT:
        raise SpoiledError(WarmStarted.CORRUPT)
    sealed = start + _exactly(read, size - _PREAMBLE)
    _check_header(sealed)
    summed.update(sealed)
    kind = 0
    while kind != END:
        head = _exactly(read, 5)
        kind, length = head[0], int.from_bytes(head[1:], "little")
        if length > _LONGEST:
            raise SpoiledError(WarmStarted.CORRUPT)
        payload = _exactly(read, length)
        summed.update(head)
        summed.update(payload)
        if _exactly(read, 16) != summed.digest():
            raise SpoiledError(WarmStarted.CORRUPT)
        yield Record(kind, payload)
    if read(1):
        raise SpoiledError(WarmStarted.CORRUPT)


def _check_header(sealed: bytes) -> None:
    body = unseal(MAGIC, VERSION, memoryview(sealed))
    if body is Reason.FOREIGN:
        newer = int.from_bytes(sealed[8:10], "little") > VERSION
        raise SpoiledError(WarmStarted.NEWER if newer else WarmStarted.FOREIGN)
    if not isinstance(body, bytes):
        raise SpoiledError(WarmStarted.CORRUPT)
    if decoded(body, Header).scheme != scheme():
        raise SpoiledError(WarmStarted.FOREIGN)


def decoded(payload: bytes, kind: Any) -> Any:
    """A msgpack value of this type. Raises SpoiledError."""
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise SpoiledError(WarmStarted.CORRUPT) from None


def piece_of(payload: bytes) -> Piece:
    """The blocks of a BLOCKS record. Raises SpoiledError."""
    count, rest = divmod(len(payload), BLOCK_BYTES)
    if rest:
        raise SpoiledError(WarmStarted.CORRUPT)
    hashes = np.frombuffer(payload, "<u8", count).astype(np.uint64)
    keys = np.frombuffer(payload, "<u8", 2 * count, 8 * count).astype(np.uint64).reshape(count, 2)
    tiers = np.frombuffer(payload, np.uint8, count, 24 * count)
    if count and not 0 < int(tiers.min()) <= int(tiers.max()) < 1 << len(Tier):
        raise SpoiledError(WarmStarted.CORRUPT)
    return Piece(hashes, keys, tiers)


def _exactly(read: Read, count: int) -> bytes:
    try:
        found = read(count)
    except OSError as error:
        raise StorageError(error.strerror or str(error)) from None
    if len(found) != count:
        raise SpoiledError(WarmStarted.TORN)
    return found
