"""Bytes straight to arrays: the same as msgspec has it, event for event, or left to msgspec."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cairn.fleet.base import Event, Removed, Stored, StoredMany, Tier, singly
from cairn.fleet.events import Decoder
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.msgpack import Payloads
from cairn.fleet.names import hash_of
from cairn.fleet.scan import scan
from tests.fleet.test_fuzz import VALID, values
from tests.fleet.wire_events import FIELDS, cleared, encode, removed, stored

WHOLE = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}


def plainly(events: Sequence[Any]) -> list[Event]:
    """Events as both ways have them in common: names as 64 bits, tokens as a list, removals of one tier as one."""
    found: list[Event] = []
    for event in singly(events):
        if isinstance(event, Stored | Removed):
            fields = {name: getattr(event, name) for name in event.__struct_fields__}
            fields["hashes"] = tuple(int(hash_of(one)) for one in event.hashes)
            if isinstance(event, Stored):
                fields["tokens"] = list(event.tokens)
                fields["parent"] = None if event.parent is None else int(hash_of(event.parent))
            found.append(type(event)(**fields))
        else:
            found.append(event)
    merged: list[Event] = []
    for event in found:
        last = merged[-1] if merged else None
        alike = isinstance(event, Removed) and isinstance(last, Removed)
        if alike and (event.tier, event.namespace_group) == (last.tier, last.namespace_group):
            merged[-1] = Removed(last.hashes + event.hashes, last.tier, last.namespace_group)
        else:
            merged.append(event)
    return merged


class Both:
    """A decoder of each kind, over the same payloads."""

    def __init__(self) -> None:
        self.metrics = FleetMetrics(), FleetMetrics()
        self.plain, self.fast = Decoder(self.metrics[0]), Decoder(self.metrics[1], many=True)

    def read(self, payloads: Sequence[bytes]) -> list[Any]:
        """What the fast one makes of them; the other must agree."""
        expected = [self.plain.decode(payload) for payload in payloads]
        found, first = [], 0
        while first < len(payloads):
            batch, count = self.fast.decode_first(Payloads.of(payloads[first:]))
            singles = expected[first : first + count]
            if batch is None:
                assert singles == [None]
            else:
                known = [one for one in singles if one is not None]
                assert len(known) == count
                assert {one.rank for one in known} == {batch.rank}
                assert batch.time == known[0].time or known[0].time != known[0].time
                assert batch.understood == sum(one.understood for one in known)
                assert plainly(batch.events) == plainly([event for one in known for event in one.events])
                found += [
                    one._replace(hashes=one.hashes.copy(), told=one.told.copy(), tokens=one.tokens.copy())
                    if isinstance(one, StoredMany)
                    else one
                    for one in batch.events
                ]
            first += count
        skipped = [sorted(one.fleet_skipped_events.samples()) for one in self.metrics]
        assert skipped[0] == skipped[1]
        assert self.metrics[0].fleet_skipped_batches.value() == self.metrics[1].fleet_skipped_batches.value()
        return found


def chained(count: int, size: int = 2, **fields: Any) -> list[dict[str, Any]]:
    """`count` events of a block each, one behind the other."""
    parents = [None, *range(1, count)]
    return [
        stored([i + 1], [(i * 7919 + j) % 100_000 for j in range(size)], size, parent_block_hash=parents[i], **fields)
        for i in range(count)
    ]


@pytest.mark.parametrize("encoding", ["maps", "arrays", "old"])
def test_what_is_alike_comes_as_one(encoding: str) -> None:
    both = Both()
    fields = {} if encoding == "old" else WHOLE
    gone = [removed([i], group_idx=None if encoding == "old" else 0) for i in (1, 2, 3)]
    story = [*chained(40, **fields), *gone, cleared(), *chained(3, 5, **fields)]
    both.read([encode(story, encoding)])  # makes the group known
    found = both.read([encode(story, encoding), encode(chained(3, 5, **fields), encoding)])
    kinds = [type(event).__name__ for event in found]
    assert kinds == ["StoredMany", "Removed", "Cleared", "StoredMany"]
    assert found[0].told[:, 2].tolist() == list(range(1, 41))
    assert found[1].hashes == (1, 2, 3)
    assert found[3].tokens.shape == (6, 5)


@pytest.mark.parametrize("key", [7, (1 << 64) - 1, b"k", b"0123456", b"k" * 32, b"k" * 64])
def test_every_form_of_a_hash(key: Any) -> None:
    (many, gone) = Both().read([encode([stored([key], [1], 1, parent_block_hash=key), removed([key])])])
    assert isinstance(many, StoredMany)
    assert many.hashes.tolist() == many.told[:, 0].tolist() == list(gone.hashes) == [int(hash_of(key))]


#: Each is left to msgspec, alone: what comes before and after is plain.
NOT_PLAIN = [
    stored([-7], [1], 1),
    stored([b"k" * 65], [1], 1),
    stored(["hex"], [1], 1),
    stored([1, 2], [1, 2, 3], 2),
    stored([1], [1], 0),
    stored([1], [1 << 32], 1),
    stored([1], [], 0, medium="CPU"),
    stored([1], [1, 2], 1),
    stored([1], [1], 1, medium="TAPE"),
    stored([1], [1], 1, medium="GPUs"),
    stored([1], [1], 1, medium="cpu"),
    stored([1], [1], 1, locality="REMOTE"),
    stored([1], [1], 1, lora_id=3),
    stored([1], [1], 1, lora_name="sql"),
    stored([1], [1], 1, extra_keys=[["salt"]]),
    stored([1], [1], 1, extra_keys=[None, None]),
    stored([1], [1], 1, lookahead_token_ids=[[7]]),
    stored([1], [1], 1, group_idx=5),
    stored([1], [1], 1, kv_cache_spec_kind="sliding_window"),
    stored([1], [1], 1, session_id=[1]),
    stored([1], [1], 1, future={"a": 1}),
    removed([1], medium="TAPE"),
    removed([]),
    removed([1], group_idx=5),
    {"type": "BlockTouched", "block_hashes": [1]},
    {"block_hashes": [1], "type": "BlockRemoved"},
    ["BlockStored"],
    [],
    7,
    None,
]


@pytest.mark.parametrize("event", NOT_PLAIN)
def test_what_is_not_plain_is_left_to_msgspec(event: Any) -> None:
    payload = encode([stored([8], [1], 1), event, removed([9])])
    scanned = scan(Payloads.of([payload]), None)
    assert scanned is not None
    assert [run[0] for run in scanned.runs] == [0, 3, 1]
    Both().read([payload])


PLAIN = [
    stored([1], [1], 1, **WHOLE),
    stored([1], [1], 1, kv_cache_spec_kind="mla_attention", kv_cache_spec_sliding_window=None),
    stored([1], [1], 1, session_id="a", future=1.5, locality="LOCAL", ownership=True),
    stored([1], [1], 1, medium=None),
    stored([1], [200], 1, extra_keys=[None]),
    stored([1] * 20, [70_000] * 40, 2, extra_keys=[None] * 20),
    removed([1], medium=None),
    removed([1], locality="LOCAL", ownership=None),
    cleared(),
]


@pytest.mark.parametrize("event", PLAIN)
@pytest.mark.parametrize("rank", [None, 0, 7, 300])
def test_what_is_plain(event: Any, rank: int | None) -> None:
    payload = encode([event], rank=rank)
    scanned = scan(Payloads.of([payload]), 0)
    assert scanned is not None
    kind = ["BlockStored", "BlockRemoved", "AllBlocksCleared"].index(event["type"])
    assert (scanned.rank, [run[0] for run in scanned.runs]) == (rank, [kind])
    assert type(scanned.rank) is type(rank)  # where kernels mix signed and unsigned, numbers become floats
    both = Both()
    both.read([encode([stored([1], [1], 1, **WHOLE)]), payload])


def test_a_field_twice_is_not_plain() -> None:
    once = msgspec.msgpack.encode("block_size") + b"\x01"
    payload = encode([stored([1], [1], 1)])
    twice = payload.replace(once, once + once).replace(b"\x88\xa4type", b"\x89\xa4type")
    assert msgspec.msgpack.decode(twice)
    assert twice != payload
    assert scan(Payloads.of([twice]), None) is None
    Both().read([twice])


@pytest.mark.parametrize("bad", [b"", b"\xc1", encode([])[:-1], encode([7]), encode([stored([1], [1], 1)]) + b"\x00"])
def test_one_payload_does_not_cost_its_neighbours(bad: bytes) -> None:
    good = [encode(chained(4)), encode([removed([1])])]
    for at in range(3):
        payloads = [*good[:at], bad, *good[at:]]
        Both().read(payloads)
        scanned = scan(Payloads.of(payloads), None)
        assert (scanned.payloads if scanned else 0) == at


def test_another_rank_is_another_batch() -> None:
    payloads = [encode(chained(4), rank=rank) for rank in (0, 0, None, None, 1)]
    decoder, counts = Decoder(FleetMetrics(), many=True), []
    while payloads:
        batch, count = decoder.decode_first(Payloads.of(payloads))
        counts.append((batch.rank, count, batch.understood))  # type: ignore[union-attr]
        payloads = payloads[count:]
    assert counts == [(0, 2, 8), (None, 2, 8), (1, 1, 4)]


tokens = st.integers(0, (1 << 32) - 1) | st.sampled_from([0, 127, 128, 255, 256, 65535, 65536])
hashes = st.one_of(
    st.integers(0, (1 << 64) - 1), st.sampled_from([-1, 0, 127, 128, 1 << 32]), st.binary(min_size=1, max_size=66)
)
odd = st.dictionaries(st.sampled_from(FIELDS["BlockStored"]), values, max_size=2)


@st.composite
def events(draw: Any) -> Any:
    if draw(st.integers(0, 9)) == 0:
        return draw(values.filter(lambda value: not isinstance(value, dict)))
    names = draw(st.lists(hashes, min_size=1, max_size=5))
    where = {"medium": draw(st.sampled_from(["GPU", "GPU", "CPU", "DISK", None]))}
    if draw(st.integers(0, 3)) == 0:
        return removed(names, **where, group_idx=draw(st.sampled_from([None, 0, 1])))
    size = draw(st.integers(1, 3))
    count = len(names) * size + draw(st.sampled_from([0, 0, 0, 0, -1, 1]))
    told = draw(st.lists(tokens, min_size=count, max_size=count))
    group = draw(st.sampled_from([{}, {}, WHOLE, WHOLE | {"group_idx": 1}]))
    parent = draw(st.none() | hashes)
    strange = draw(odd) if draw(st.integers(0, 4)) == 0 else {}
    return stored(names, told, size, parent_block_hash=parent, **where, **group) | strange


@settings(max_examples=120, deadline=None)
@given(st.lists(st.lists(events(), max_size=6), min_size=1, max_size=4), st.sampled_from(["maps", "arrays"]))
def test_any_batches(batches: list[list[Any]], encoding: str) -> None:
    Both().read([encode(batch, encoding) for batch in batches])


@settings(max_examples=600, deadline=None)
@given(st.sampled_from([*VALID, encode(chained(3, **WHOLE)), encode(chained(3, **WHOLE), "arrays")]), st.data())
def test_damaged_batches(payload: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(payload) - 1))
    damage = data.draw(st.binary(max_size=8))
    Both().read([payload, payload[:at] + damage + payload[at + data.draw(st.integers(0, 2)) :], payload])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100))
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\x91" * 100)
@example(b"\xdf\x7f\xff\xff\xff" * 20)
def test_random_bytes(noise: bytes) -> None:
    Both().read([noise, b"\x93\xcb" + bytes(8) + noise, b"\x93\xcb" + bytes(8) + b"\x91" + noise])


@pytest.mark.parametrize(
    "claim", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdc\xff\xff"]
)
def test_lengths_that_lie(claim: bytes) -> None:
    good = encode([stored([1], [1, 2], 2)])
    for place in (b"\x91\x01", b"\x92\x01\x02", b"\x91\x88", b"\xa3GPU"):
        assert place in good
        Both().read([good.replace(place, claim + b"\x01" * 30, 1)])


def test_one_by_one_is_what_was_told() -> None:
    (many,) = Both().read([encode(chained(3, 2))])
    assert isinstance(many, StoredMany)
    rest = many.behind(1)
    assert [event.hashes for event in many.each()] == [(1,), (2,), (3,)]
    assert [(event.hashes, event.parent, list(event.tokens)) for event in rest.each()] == [
        ((2,), 1, [7919, 7920]),
        ((3,), 2, [15838, 15839]),
    ]
    assert many.tier is Tier.VRAM
