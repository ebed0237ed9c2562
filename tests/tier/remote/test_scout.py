"""Lookups: at most two round trips whatever the store answers for at a time, and what is remembered of them."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.codec import Raw
from cairn.codec.frame import Framer
from cairn.observe.reasons import Reason
from cairn.tier.breaker import Breaker
from cairn.tier.known import Known
from cairn.tier.remote.packing import BLOCKS_LIMIT, Packing, Span, blocks_of
from cairn.tier.remote.scout import Scout
from cairn.tier.remote.share import Share
from tests.tier.rig import GEOMETRY, prompt


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Names:
    """Of a store only its answer to lookups: a set of names. (Real stores are asked in the conformance suite.)"""

    def __init__(self, probe_names: int) -> None:
        self.probe_names = probe_names
        self.there: set[bytes] = set()
        self.asked: list[int] = []
        self.failing: Reason | None = None

    def exists(self, names: list[bytes], *, deadline: float) -> list[bool] | Reason:
        assert len(names) <= self.probe_names
        assert len(names) == len(set(names))
        self.asked.append(len(names))
        return self.failing or [name in self.there for name in names]


def made(probe_names: int, pack: int) -> tuple[Scout, Names, Packing, Clock]:
    store, clock, packing = Names(probe_names), Clock(), Packing(Framer(Raw(GEOMETRY)), pack)
    known = Known(present_s=60, absent_s=2, clock=clock)
    return Scout(store, packing, Breaker(), known), store, packing, clock  # type: ignore[arg-type]


def put(store: Names, packing: Packing, keys: np.ndarray, upto: int) -> None:
    for span in packing.spans(0, upto):
        store.there.add(packing.name(keys[span.stop - 1].tobytes()))


def ask(scout: Scout, keys: np.ndarray) -> int:
    assert scout.ask(keys, time.monotonic() + 10) is None
    return scout.match(keys)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 150),
    held=st.integers(0, 150),
    pack=st.sampled_from([1, 2, 4, 8]),
    probe_names=st.sampled_from([16, 24, 4096]),
)
def test_the_whole_prefix_is_found_in_two_round_trips(length: int, held: int, pack: int, probe_names: int) -> None:
    keys = prompt(1, 150)
    scout, store, packing, _ = made(probe_names, pack)
    put(store, packing, keys, held)
    found = ask(scout, keys[:length])
    assert len(store.asked) <= 2
    reachable = held if held <= length else length // pack * pack
    # A sample that leaves too much between says nothing of an object that is not whole.
    assert found == reachable or (probe_names < 4096 and found == reachable // pack * pack)
    before = len(store.asked)
    assert ask(scout, keys[:length]) == found
    assert len(store.asked) - before <= (0 if found == reachable else 2)


def test_what_is_not_there_is_asked_again_after_two_seconds_and_what_is_after_a_minute() -> None:
    scout, store, packing, clock = made(4096, 4)
    keys = prompt(2, 16)
    assert ask(scout, keys) == 0
    put(store, packing, keys, 16)
    assert ask(scout, keys) == 0
    clock.now += 2.5
    assert ask(scout, keys) == 16
    store.there.clear()
    clock.now += 59
    assert ask(scout, keys) == 16
    clock.now += 2
    assert scout.match(keys) == 0
    assert ask(scout, keys) == 0


def test_a_gap_that_a_sample_stepped_over_ends_the_prefix_once_it_is_read() -> None:
    scout, store, packing, _ = made(8, 1)
    keys = prompt(3, 100)
    put(store, packing, keys, 100)
    store.there.discard(packing.name(keys[50].tobytes()))
    assert ask(scout, keys) == 100
    scout._known.note([keys[50].tobytes()], False)  # as a read does that finds nothing
    assert scout.match(keys) == 50


def test_a_store_that_does_not_answer_is_not_asked_for_long() -> None:
    scout, store, _, _ = made(4096, 4)
    store.failing = Reason.IO_ERROR
    for _ in range(3):
        assert scout.ask(prompt(4, 16), time.monotonic() + 10) is Reason.IO_ERROR
    assert scout.ask(prompt(4, 16), time.monotonic() + 10) is Reason.BREAKER_OPEN
    assert len(store.asked) == 3


def test_an_answer_that_had_no_time_is_not_the_stores_fault() -> None:
    scout, store, _, _ = made(4096, 4)
    store.failing = Reason.TIMEOUT
    for _ in range(5):
        assert scout.ask(prompt(5, 16), time.monotonic()) is Reason.TIMEOUT


def test_the_largest_object_that_holds_a_block() -> None:
    scout, store, packing, _ = made(4096, 4)
    keys = prompt(6, 10)
    put(store, packing, keys, 7)
    store.there.add(packing.name(keys[5].tobytes()))
    ask(scout, keys)
    assert scout.covering(keys, 3) == Span(0, 4)
    assert scout.covering(keys, 5) == Span(4, 7)
    assert scout.covering(keys, 8) is None


def test_known_objects_are_bounded() -> None:
    known = Known(present_s=60, absent_s=2, limit=10)
    known.note([bytes([i]) * 16 for i in range(30)], True)
    assert len(known) == 10
    assert (known.get(bytes([29]) * 16), known.get(bytes([3]) * 16)) == (True, None)


@pytest.mark.parametrize(
    ("object_bytes", "block_bytes", "blocks"),
    [(8 << 20, 2 << 20, 4), (8 << 20, 3 << 20, 2), (1, 4096, 1), (16 << 20, 4096, BLOCKS_LIMIT), (8 << 20, 8 << 20, 1)],
)
def test_blocks_of_an_object(object_bytes: int, block_bytes: int, blocks: int) -> None:
    assert blocks_of(object_bytes, block_bytes) == blocks


def test_stores_wait_while_loads_are_under_way_and_not_otherwise() -> None:
    share = Share(0.25)

    def waited(size: int, seconds: float) -> float:
        begun = time.monotonic()
        share.before_store(size, begun + seconds)
        return time.monotonic() - begun

    assert waited(1000, 60) < 10
    share.begin_load()
    assert waited(1000, 0.1) >= 0.1
    share.begin_load()
    share.end_load(10_000)
    assert waited(1000, 60) < 10, "a quarter of what was moved is theirs"
    assert waited(5000, 0.1) >= 0.1
    share.end_load(100)
    assert waited(5000, 60) < 10
    assert share.held_back == 2
