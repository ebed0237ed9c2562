"""A sealed header: a few bytes of msgpack behind a fixed preamble that proves them whole.

    offset  bytes
    0       8      magic
    8       2      format version            little-endian, as all that follows
    10      2      size of the whole header, zero padding included
    12      2      size of the body
    14      2      zero
    16      8      xxh3-64 of all the other bytes of the header
    24             body, then zeros

The preamble is the same in every format version, so that a header of another version can be told from a damaged one.
Every bit of a header is either compared or under the checksum.
"""

import struct
from typing import Final

import xxhash

from cairn.observe.reasons import Reason

#: Largest header; also the page that the disk tier gives to it.
HEADER_LIMIT: Final = 4096

_PREAMBLE: Final = struct.Struct("<8sHHHHQ")
_FIELDS: Final = struct.Struct("<8sHHHH")


def seal(magic: bytes, version: int, body: bytes, size: int | None = None) -> bytes:
    """The header around `body`, zero-padded to `size` bytes (as long as needed unless given).

    The caller keeps 24 + len(body) <= size <= HEADER_LIMIT; a body that cannot fit is a bug and raises ValueError.
    """
    size = _PREAMBLE.size + len(body) if size is None else size
    if not _PREAMBLE.size + len(body) <= size <= HEADER_LIMIT:
        raise ValueError(f"header of {len(body)} body bytes in {size}: must fit, with {_PREAMBLE.size} bytes before it")
    fields = _FIELDS.pack(magic, version, size, len(body), 0)
    rest = body.ljust(size - _PREAMBLE.size, b"\0")
    return fields + _checksum(fields, rest) + rest


def amend(header: bytearray, end: bytes) -> None:
    """Puts `end` at the end of the body of a header that `seal` has made, in place of as many bytes."""
    *_, size, length, _, _ = _PREAMBLE.unpack_from(header)
    stop = _PREAMBLE.size + length
    header[stop - len(end) : stop] = end
    with memoryview(header) as view:
        header[_FIELDS.size : _PREAMBLE.size] = _checksum(view[: _FIELDS.size], view[_PREAMBLE.size : size])


def unseal(magic: bytes, version: int, data: memoryview) -> bytes | Reason:
    """The body of the header that starts `data`; CORRUPT if not whole, FOREIGN if whole but of another version."""
    if len(data) < _PREAMBLE.size:
        return Reason.CORRUPT
    found_magic, found_version, size, length, zero, _ = _PREAMBLE.unpack_from(data)
    if found_magic != magic or zero or not _PREAMBLE.size + length <= size <= min(HEADER_LIMIT, len(data)):
        return Reason.CORRUPT
    fields, checksum, rest = data[: _FIELDS.size], data[_FIELDS.size : _PREAMBLE.size], data[_PREAMBLE.size : size]
    if checksum != _checksum(fields, rest):
        return Reason.CORRUPT
    return bytes(rest[:length]) if found_version == version else Reason.FOREIGN


def _checksum(fields: bytes | memoryview, rest: bytes | memoryview) -> bytes:
    hasher = xxhash.xxh3_64(fields)
    hasher.update(rest)
    return hasher.intdigest().to_bytes(8, "little")
