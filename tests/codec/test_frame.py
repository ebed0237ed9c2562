"""The object frame: what is written is read back; what is not exactly that is a Reason, never an exception."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn.codec import FrameHeader, Raw, Shard
from cairn.codec.frame import MAGIC, VERSION, Framer, checksum_of, parse
from cairn.codec.seal import HEADER_LIMIT, amend, seal
from cairn.kv import KVGeometry
from cairn.observe.reasons import Reason

GEOMETRY = KVGeometry(layers=2, kv_heads=1, head_dim=8, dtype="float16", block_tokens=4)
KEY, NAMESPACE = b"k" * 16, b"n" * 16
BLOCK = np.random.default_rng(1).integers(0, 256, GEOMETRY.block_bytes, np.uint8)


def framer(shard: Shard | None = None) -> Framer:
    return Framer(Raw(GEOMETRY), shard or Shard())


def packed(size: int | None = None) -> bytes:
    return framer().pack(KEY, NAMESPACE, len(BLOCK), checksum_of(BLOCK), size=size)


def header(**changes: object) -> FrameHeader:
    found = framer().expect(memoryview(packed()), KEY)
    assert isinstance(found, FrameHeader)
    return msgspec.structs.replace(found, **changes)


def resealed(frame: FrameHeader) -> memoryview:
    return memoryview(seal(MAGIC, VERSION, msgspec.msgpack.encode(frame)))


@pytest.mark.parametrize("size", [None, 512, HEADER_LIMIT])
def test_round_trip(size: int | None) -> None:
    page = packed(size)
    found = framer().expect(memoryview(page), KEY)
    assert isinstance(found, FrameHeader)
    assert (found.key, found.namespace, found.geometry) == (KEY, NAMESPACE, GEOMETRY)
    assert (found.codec, found.raw_bytes, found.stored_bytes) == ("raw", len(BLOCK), len(BLOCK))
    assert found.verifies(BLOCK)
    assert size is None or len(page) == size


@pytest.mark.parametrize("size", [None, HEADER_LIMIT])
def test_a_checksum_that_is_filled_in_later_makes_the_same_header(size: int | None) -> None:
    page = bytearray(framer().pack(KEY, NAMESPACE, len(BLOCK), bytes(16), size=size))
    for checksum in (b"y" * 16, checksum_of(BLOCK)):
        amend(page, checksum)
        assert page == framer().pack(KEY, NAMESPACE, len(BLOCK), checksum, size=size)


def test_every_byte_of_a_header_page_counts() -> None:
    page = packed(HEADER_LIMIT)
    for at in range(HEADER_LIMIT):
        damaged = bytearray(page)
        damaged[at] ^= 1 << at % 8
        assert parse(memoryview(damaged)) is Reason.CORRUPT


def test_every_payload_bit_counts() -> None:
    frame = header()
    for bit in range(8 * len(BLOCK)):
        damaged = BLOCK.copy()
        damaged[bit // 8] ^= 1 << bit % 8
        assert not frame.verifies(damaged)
    assert not frame.verifies(BLOCK[:-1])


def test_another_object_is_foreign() -> None:
    page = memoryview(packed())
    other_geometry = Framer(Raw(msgspec.structs.replace(GEOMETRY, layers=1)))
    assert framer().expect(page, b"x" * 16) is Reason.FOREIGN
    assert framer(Shard(1, 2)).expect(page, KEY) is Reason.FOREIGN
    assert other_geometry.expect(page, KEY) is Reason.FOREIGN
    assert framer().expect(resealed(header(codec="int8")), KEY) is Reason.FOREIGN
    assert framer().expect(resealed(header(parameters=b"q")), KEY) is Reason.FOREIGN


def test_another_version_is_foreign() -> None:
    body = msgspec.msgpack.encode(header())
    assert parse(memoryview(seal(MAGIC, VERSION + 1, body))) is Reason.FOREIGN


@pytest.mark.parametrize(
    "changes",
    [{"stored_bytes": 1 << 62}, {"stored_bytes": -1}, {"raw_bytes": 1}, {"checksum": b""}, {"key": b"short"}],
)
def test_lengths_are_bounded_before_use(changes: dict[str, object]) -> None:
    assert framer().expect(resealed(header(**changes)), KEY) is Reason.CORRUPT


def test_a_body_that_cannot_fit_is_refused_when_written() -> None:
    with pytest.raises(ValueError, match="must fit"):
        seal(MAGIC, VERSION, bytes(HEADER_LIMIT))


@given(st.binary(max_size=300))
def test_parse_never_raises(data: bytes) -> None:
    assert isinstance(parse(memoryview(data)), Reason)


@given(st.binary(max_size=300))
def test_a_sealed_body_of_anything_never_raises(body: bytes) -> None:
    assert isinstance(parse(memoryview(seal(MAGIC, VERSION, body))), Reason)


def test_deep_nesting_is_corrupt() -> None:
    assert parse(memoryview(seal(MAGIC, VERSION, b"\x91" * 4000))) is Reason.CORRUPT
