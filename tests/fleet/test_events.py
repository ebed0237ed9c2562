"""Decoding: both encodings, every medium, what separates blocks, groups, and what is not as expected."""

import tracemalloc
from typing import Any

import msgspec
import pytest

from cairn.fleet.base import Cleared, Event, Removed, Stored, Tier
from cairn.fleet.events import Decoder
from cairn.fleet.metrics import FleetMetrics, Skip
from cairn.fleet.separation import extra_digest, namespace_digest
from cairn.fleet.wire import MAX_PAYLOAD
from cairn.kv.namespace import salt_mark
from cairn.observe.prometheus import exposition
from tests.fleet.wire_events import cleared, encode, removed, stored

FULL = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}


class Reader:
    """A decoder and what it counts."""

    def __init__(self) -> None:
        self.metrics = FleetMetrics()
        self.decoder = Decoder(self.metrics)

    def read(self, *events: Any, encoding: str = "maps") -> list[Event]:
        batch = self.decoder.decode(encode(list(events), encoding))
        assert batch is not None
        return batch.events

    def skipped(self) -> dict[str, float]:
        return {reason: amount for (reason,), amount in self.metrics.fleet_skipped_events.samples()}


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.mark.parametrize("encoding", ["maps", "arrays"])
@pytest.mark.parametrize("blocks", [1, 3, 15, 16, 600])
@pytest.mark.parametrize("size", [1, 16, 128])
def test_a_stored_event(reader: Reader, encoding: str, blocks: int, size: int) -> None:
    hashes = [(1 << 64) - 1 - i for i in range(blocks)]
    tokens = [(i * 7919) % (1 << (8 * (i % 4 + 1))) for i in range(blocks * size)]
    wire = stored(hashes, tokens, size, parent_block_hash=5, extra_keys=[None] * blocks, **FULL)
    (event,) = reader.read(wire, encoding=encoding)
    assert isinstance(event, Stored)
    assert (event.hashes, event.parent, event.block_tokens) == (tuple(hashes), 5, size)
    assert list(event.tokens) == tokens
    assert (event.tier, event.namespace, event.extra) == (Tier.VRAM, b"", ())
    assert reader.skipped() == {}


@pytest.mark.parametrize("encoding", ["maps", "arrays", "old"])
def test_every_kind_and_both_kinds_of_hashes(reader: Reader, encoding: str) -> None:
    for key in (7, -7, b"k" * 32):
        events = reader.read(stored([key], [1, 2], 2), removed([key]), cleared(), encoding=encoding)
        assert [type(event) for event in events] == [Stored, Removed, Cleared]
        assert events[0].hashes == events[1].hashes == (key,)
        assert events[1].tier == (None if encoding == "old" else Tier.VRAM)


def test_one_source_may_change_its_encoding(reader: Reader) -> None:
    for encoding in ("maps", "arrays", "arrays", "maps", "old"):
        assert len(reader.read(stored([1], [1], 1), encoding=encoding)) == 1
    assert reader.skipped() == {}


@pytest.mark.parametrize(
    ("medium", "locality", "tier"),
    [
        ("GPU", None, Tier.VRAM),
        (None, None, Tier.VRAM),
        ("CPU", None, Tier.CPU),
        ("cpu", None, Tier.CPU),
        ("CPU_PINNED", None, Tier.CPU),
        ("STORAGE", None, Tier.DISK),
        ("STORAGE", "LOCAL", Tier.DISK),
        ("STORAGE", "REMOTE", Tier.REMOTE),
        ("DISK", None, Tier.DISK),
        ("FS", None, Tier.DISK),
        ("OBJ", None, Tier.REMOTE),
        ("EXTERNAL", None, Tier.REMOTE),
    ],
)
@pytest.mark.parametrize("encoding", ["maps", "arrays"])
def test_mediums(reader: Reader, medium: str | None, locality: str | None, tier: Tier, encoding: str) -> None:
    where = {"medium": medium} | ({"locality": locality} if locality else {})
    (event,) = reader.read(stored([1], [1], 1, **where))
    assert event.tier is tier
    fields = {} if encoding == "maps" else {"group_idx": None}
    (event,) = reader.read(removed([1], **where, **fields), encoding=encoding)
    assert event.tier is (None if medium is None else tier)


def test_a_tokenless_event_names_blocks_told_before(reader: Reader) -> None:
    (event,) = reader.read(stored([4], [], 0, medium="CPU", group_idx=0))
    assert (event.hashes, list(event.tokens), event.block_tokens, event.tier) == ((4,), [], 0, Tier.CPU)


def test_a_partial_block_has_its_own_size(reader: Reader) -> None:
    (event,) = reader.read(stored([4], [1, 2, 3], 3, parent_block_hash=3, **FULL))
    assert (event.block_tokens, list(event.tokens)) == (3, [1, 2, 3])


def test_an_unfinished_block_at_the_end_is_cut_off(reader: Reader) -> None:
    (event,) = reader.read(stored([4, 5], [1, 2, 3, 4, 5], 2))
    assert list(event.tokens) == [1, 2, 3, 4]


def namespaces(reader: Reader, *events: Any) -> list[bytes]:
    return [event.namespace for event in reader.read(*events)]


def test_adapters_and_salts_separate(reader: Reader) -> None:
    keys = [["sql", "t1"], ["sql"]]
    found = namespaces(
        reader,
        stored([1], [1], 1),
        stored([1], [1], 1, lora_name="sql", lora_id=3, extra_keys=[["sql"]]),
        stored([1], [1], 1, lora_id=3),
        stored([1], [1], 1, extra_keys=[["sql"]]),
        stored([1, 2], [1, 2], 1, lora_name="sql", extra_keys=keys),
    )
    assert found == [
        b"",
        namespace_digest("sql"),
        namespace_digest(3),
        namespace_digest(salt="sql"),
        namespace_digest("sql", "t1"),
    ]
    assert len(set(found)) == 5


def test_the_salts_mark_of_our_own_events_is_the_same_as_vllms_salt(reader: Reader) -> None:
    mark = salt_mark("tenant-a")
    ours, later, theirs = namespaces(
        reader,
        stored([b"1", b"2"], [1, 2], 1, extra_keys=[[mark], [["img", 0], mark]], medium="CPU"),
        stored([b"3"], [3], 1, parent_block_hash=b"2", extra_keys=[[mark]], medium="CPU"),
        stored([1, 2], [1, 2], 1, extra_keys=[["tenant-a"], [["img", 0]]]),
    )
    assert ours == later == theirs == namespace_digest(salt="tenant-a")


def test_pictures_separate_their_blocks(reader: Reader) -> None:
    keys = [None, [["img1", 0]], [["img1", -16], ["img2", 3]], [b"d" * 32]]
    (event,) = reader.read(stored([1, 2, 3, 4], [1, 2, 3, 4], 1, extra_keys=keys))
    assert event.extra == (
        None,
        extra_digest([("img1", 0)]),
        extra_digest([("img1", -16), ("img2", 3)]),
        extra_digest([b"d" * 32]),
    )
    assert len(set(event.extra)) == 4
    assert event.namespace == b""


def test_tokens_behind_a_block_that_its_hash_covers_separate_it(reader: Reader) -> None:
    """vLLM 0.33 with lookahead hashing: the same tokens, but other blocks."""
    plain, ahead, other = (
        reader.read(stored([1, 2], [1, 2], 1, **fields))[0]
        for fields in ({}, {"lookahead_token_ids": [[7], []]}, {"lookahead_token_ids": [[8], []]})
    )
    assert plain.extra == ()
    assert ahead.extra == (extra_digest([("lookahead", 7)]), None)
    assert len({plain.extra, ahead.extra, other.extra}) == 3
    assert reader.read(stored([1, 2], [1, 2], 1, lookahead_token_ids=[[7]])) == []
    assert reader.skipped() == {Skip.EXTRA_KEYS: 1}


@pytest.mark.parametrize("keys", [[None], [["a"], None, None], [[salt_mark("a")], [salt_mark("b")]]])
def test_extra_keys_that_do_not_fit(reader: Reader, keys: list[Any]) -> None:
    assert reader.read(stored([1, 2], [1, 2], 1, extra_keys=keys)) == []
    assert reader.skipped() == {Skip.EXTRA_KEYS: 1}


def test_only_one_full_attention_group_goes_on(reader: Reader) -> None:
    window = {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 512}
    events = reader.read(
        stored([1], [1], 1, group_idx=0, **window),
        stored([1], [1], 1, group_idx=1, kv_cache_spec_kind="full_attention"),
        stored([1], [1], 1, group_idx=2, kv_cache_spec_kind="mla_attention"),
        stored([2], [], 0, group_idx=0, medium="CPU"),
        stored([2], [], 0, group_idx=1, medium="CPU"),
        removed([1], group_idx=0),
        removed([1], group_idx=2),
        removed([1], group_idx=1),
        removed([1], group_idx=7),
        stored([1], [1], 1, group_idx=7),
    )
    assert [type(event) for event in events] == [Stored, Stored, Removed, Removed]
    assert events[1].tier is Tier.CPU
    assert [event.namespace_group for event in events[2:]] == [None, 7]
    assert reader.skipped() == {Skip.NOT_FULL_ATTENTION: 3, Skip.OTHER_GROUP: 2, Skip.UNKNOWN_GROUP: 1}


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (stored([], [], 4), Skip.EMPTY),
        (removed([]), Skip.EMPTY),
        (stored([1, 2], [1, 2, 3], 2), Skip.TOKEN_COUNT),
        (stored([1], [1], 0), Skip.TOKEN_COUNT),
        (stored([1], [1, 2, 3, 4], 2), Skip.AMBIGUOUS),
        (stored([1], [1], 1, medium="TAPE"), Skip.UNKNOWN_MEDIUM),
        (removed([1], medium="TAPE"), Skip.UNKNOWN_MEDIUM),
        (stored([1], [-1], 1), Skip.MALFORMED),
        (stored([1], [1 << 32], 1), Skip.MALFORMED),
        (stored([1], [1 << 32] * 300, 300), Skip.MALFORMED),
        (stored([1], [*range(400), "x"], 401), Skip.MALFORMED),
        (stored([1], [1.5], 1), Skip.MALFORMED),
        (stored([1], {"a": 1}, 1), Skip.MALFORMED),  # type: ignore[arg-type]
        (stored(["hex"], [1], 1), Skip.MALFORMED),
        (stored([b"x" * 65], [1], 1), Skip.MALFORMED),
        (stored([1], [1], 1, group_idx=-1), Skip.MALFORMED),
        (stored([1], [1], -1), Skip.MALFORMED),
        (stored([1], [1], 1, extra_keys=[[{"a": 1}]]), Skip.EXTRA_KEYS),
        (stored([1], [1], 1, extra_keys={"a": 1}), Skip.MALFORMED),
        (removed([1], medium=3), Skip.MALFORMED),
        ({"type": "BlockTouched", "block_hashes": [1]}, Skip.UNKNOWN_TAG),
        (["BlockTouched", 1], Skip.UNKNOWN_TAG),
        ({"block_hashes": [1]}, Skip.MALFORMED),
        (["BlockStored"], Skip.MALFORMED),
        ([], Skip.MALFORMED),
        (7, Skip.MALFORMED),
        (None, Skip.MALFORMED),
    ],
)
@pytest.mark.parametrize("encoding", ["maps", "arrays"])
def test_what_is_not_understood_costs_itself_only(reader: Reader, event: Any, reason: Skip, encoding: str) -> None:
    if encoding == "arrays" and isinstance(event, dict) and "type" not in event:
        return
    before, after = stored([8], [1], 1), removed([9])
    events = reader.read(before, event, after, encoding=encoding)
    assert [one.hashes for one in events] == [(8,), (9,)]
    assert reader.skipped() == {reason: 1}


def test_unknown_fields_are_skipped(reader: Reader) -> None:
    event = stored([1], [1], 1, session_id=[1], future={"a": [1, {"b": b"c"}]})
    assert len(reader.read(event)) == 1
    array = msgspec.msgpack.decode(encode([event], "arrays"))
    array[1][0] += [[[1]], {"a": 1}]
    batch = reader.decoder.decode(msgspec.msgpack.encode([*array, "new", 5]))
    assert batch is not None
    assert len(batch.events) == 1


def test_payloads_that_are_no_batches(reader: Reader) -> None:
    for payload in (b"", b"\xc1", b"\x90", msgspec.msgpack.encode({"a": 1}), encode([])[:-1], encode([], rank=-1)):
        assert reader.decoder.decode(payload) is None
    assert reader.metrics.fleet_skipped_batches.value(reason=Skip.NOT_A_BATCH) == 6
    assert reader.decoder.decode(bytes(MAX_PAYLOAD + 1)) is None
    assert reader.metrics.fleet_skipped_batches.value(reason=Skip.TOO_LARGE) == 1


def test_ranks_and_times(reader: Reader) -> None:
    for rank in (None, 0, 7):
        batch = reader.decoder.decode(encode([], rank=rank, time=12.25))
        assert batch is not None
        assert (batch.rank, batch.time) == (rank, 12.25)


def test_the_counters_are_shown_to_prometheus(reader: Reader) -> None:
    reader.read(stored([1], [1], 1, medium="TAPE"))
    assert b'cairn_fleet_skipped_events_total{reason="unknown_medium"} 1.0' in exposition(reader.metrics)


@pytest.mark.parametrize("nils", [True, False])
def test_nothing_is_kept_of_events_of_very_many_blocks(nils: bool) -> None:
    decoder = Decoder(FleetMetrics())

    def decode(blocks: int) -> int:
        told = {"type": "BlockStored", "block_hashes": [1] * blocks, "extra_keys": [None] * blocks if nils else None}
        batch = decoder.decode(msgspec.msgpack.encode([1.0, [told]]))
        assert batch is not None
        return len(batch.events)

    decode(1)
    tracemalloc.start()
    try:
        assert [decode(100_000 + more) for more in range(2)] == [1] * 2
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
