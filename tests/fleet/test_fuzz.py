"""Whatever comes over the wire: nothing is raised, memory stays bounded, sound events before and after are kept."""

import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cairn.fleet.base import Cleared, Removed, Stored
from cairn.fleet.events import Decoder
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.msgpack import parse_tokens
from tests.fleet.wire_events import FIELDS, cleared, encode, removed, stored

VALID = [
    encode([cleared(), stored([1, 2], [1, 2, 3, 4], 2, extra_keys=[["s"], [["img", 1]]]), removed([3])]),
    encode([stored(list(range(40)), list(range(70_000, 70_640)), 16, lora_name="l")], "arrays"),
    encode([{"type": "New"}, stored([b"x" * 32], [1] * 300, 300)]),
]

leaves = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def decode(payload: bytes) -> Any:
    batch = Decoder(FleetMetrics()).decode(payload)
    for event in batch.events if batch else ():
        assert isinstance(event, Stored | Removed | Cleared)
        if isinstance(event, Stored):
            assert event.hashes
            assert not event.tokens or len(event.tokens) == len(event.hashes) * event.block_tokens
            assert not event.extra or len(event.extra) == len(event.hashes)
            assert all(0 <= token < 1 << 32 for token in event.tokens)
    return batch


@settings(deadline=None)
@given(st.binary(max_size=200))
@example(b"\x91" * 100_000)
@example(b"\x93\x01\x91" + b"\x91" * 100_000)
@example(b"\x93\x01\xdd\xff\xff\xff\xff\xc0")
def test_random_bytes(payload: bytes) -> None:
    decode(payload)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(VALID), st.data())
def test_damaged_batches(payload: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(payload) - 1))
    if data.draw(st.booleans()):
        decode(payload[:at])
    else:
        decode(payload[:at] + data.draw(st.binary(min_size=1, max_size=8)) + payload[at + 1 :])


@settings(max_examples=400, deadline=None)
@given(values, st.sampled_from(FIELDS["BlockStored"]))
def test_any_value_in_any_field(value: Any, field: str) -> None:
    event = stored([1], [5, 6], 2) | {field: value}
    for encoding in ("maps", "arrays"):
        batch = decode(encode([removed([8]), event, removed([9])], encoding))
        assert [one.hashes for one in batch.events[:: max(1, len(batch.events) - 1)]] == [(8,), (9,)]


@settings(deadline=None)
@given(values)
def test_any_event(value: Any) -> None:
    batch = decode(encode([removed([8]), value, removed([9])]))
    assert [one.hashes for one in batch.events[:: max(1, len(batch.events) - 1)]] == [(8,), (9,)]


@settings(deadline=None)
@given(st.lists(st.integers(0, (1 << 32) - 1) | st.sampled_from([0, 127, 128, 255, 256, 65535, 65536]), max_size=400))
def test_tokens_are_what_msgspec_says(tokens: list[int]) -> None:
    for padding in (0, 300):
        given = tokens + [7] * padding
        parsed = parse_tokens(msgspec.Raw(msgspec.msgpack.encode(given)))
        assert parsed is not None
        assert list(parsed) == given


@settings(deadline=None)
@given(st.integers(0, 2000), st.sampled_from([1, 200, 40_000, 1 << 31]))
def test_cut_or_padded_tokens_are_none(cut: int, token: int) -> None:
    whole = msgspec.msgpack.encode([token] * 300)
    assert parse_tokens(msgspec.Raw(whole + b"\x00")) is None
    if cut < len(whole) - 260:
        assert parse_tokens(msgspec.Raw(whole[: len(whole) - 1 - cut])) is None


@settings(deadline=None)
@given(st.binary(min_size=260, max_size=400), st.sampled_from([b"", b"\xdc\x01\x00", b"\xdd\x00\x00\x01\x00", b"\x9f"]))
def test_tokens_from_random_bytes(noise: bytes, head: bytes) -> None:
    """The kernel must neither read beyond its bytes nor take what msgspec would not."""
    raw = head + noise
    parsed = parse_tokens(msgspec.Raw(raw))
    try:
        expected = msgspec.msgpack.decode(raw, type=list[int])
    except msgspec.DecodeError:
        expected = None
    assert (None if parsed is None else list(parsed)) in (expected, None)


@pytest.mark.parametrize(
    "claim",
    [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"],
)
def test_a_length_that_lies_takes_no_memory(claim: bytes) -> None:
    padded = claim + b"\x01" * 1000
    good = encode([stored([1], [1, 2], 2)])
    payloads = [b"\x93\x01" + padded, b"\x93\x01\x91" + padded, good.replace(b"\x92\x01\x02", padded)]
    payloads += [good.replace(b"\x91\x01", padded, 1), padded]
    tracemalloc.start()
    for payload in payloads:
        decode(payload)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
