"""Copies of a block against a multiset: an engine's pool, in which blocks lie several times, told of over the wire."""

from collections import Counter
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.fleet import FleetIndex, Removed, Source, Stored, Tier
from cairn.fleet.events import Decoder
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.names import MOST_COPIES
from tests.fleet.test_model import check
from tests.fleet.wire_events import cleared, encode, removed, stored

A, SIZE = Source("a", 0), 2
#: Two prompts of five blocks that part behind the second.
PROMPTS = ([0] * 10, [0, 0, 0, 0, 1, 1, 0, 0, 1, 1])
NAMES = ([1, 2, 3, 4, 5], [1, 2, 13, 14, 15])


class Pool:
    """held: what lies in the engine, each copy. told: what of that its events prove, by the rule: told again behind a
    parent is another copy, told again from a prompt's start on may be the same.
    """

    def __init__(self, *, copies: bool) -> None:
        self.held: Counter[int] = Counter()
        self.told: Counter[int] = Counter()
        self._copies = copies

    def store(self, prompt: int, first: int, stop: int, *, again: bool) -> dict[str, Any] | None:
        """Computes blocks whose prefix is held; or, again, only tells of what is held from the first on."""
        names = NAMES[prompt]
        if not all(self.held[name] for name in names[: stop if again else first]):
            return None
        first = 0 if again else first
        if not first or self.told[names[first - 1]]:
            for name in names[first:stop]:
                more = not self.told[name] or (first > 0 and self._copies)
                self.told[name] = min(MOST_COPIES + 1, self.told[name] + more)
        if not again:
            self.held.update(names[first:stop])
        tokens, parent = PROMPTS[prompt][SIZE * first : SIZE * stop], names[first - 1] if first else None
        return stored(names[first:stop], tokens, SIZE, parent_block_hash=parent)

    def evict(self, name: int) -> dict[str, Any] | None:
        if not self.held[name]:
            return None
        self.held[name] -= 1
        self.told[name] = max(0, self.told[name] - 1)
        return removed([name])

    def clear(self) -> dict[str, Any]:
        self.held.clear()
        self.told.clear()
        return cleared()


def leading(names: list[int], counts: Counter[int]) -> int:
    return SIZE * next((i for i, name in enumerate(names) if not counts[name]), len(names))


firsts = st.sampled_from([0, 0, 0, 1, 2, 3, 4])
stores = st.tuples(st.just("store"), st.integers(0, 1), firsts, st.integers(1, 5), st.booleans())
evictions = st.tuples(st.just("evict"), st.sampled_from(NAMES[0] + NAMES[1]))
turns = st.tuples(stores, stores, evictions, evictions).map(list)
stories = st.lists(turns | st.just([("clear",)]), min_size=3, max_size=20).map(lambda parts: [*chain(*parts)])


@settings(max_examples=150, deadline=None)
@given(stories, st.integers(1, 8), st.booleans(), st.booleans())
def test_the_index_holds_what_the_pool_holds(story: list[Any], batch: int, many: bool, copies: bool) -> None:
    index, pool = FleetIndex(64), Pool(copies=copies)
    decoder, events = Decoder(FleetMetrics(), many=many, copies=copies), list[Any]()
    for i, (kind, *what) in enumerate(story):
        event: Any = None
        if kind == "store":
            prompt, first, count, again = what
            event = pool.store(prompt, first, min(5, first + count), again=again)
        else:
            event = pool.evict(*what) if kind == "evict" else pool.clear()
        events += [event] if event else []
        if i % batch and i + 1 < len(story):
            continue
        told = decoder.decode(encode(events))
        assert told is not None
        index.apply(A, told.events)
        events = []
        for tokens, names in zip(PROMPTS, NAMES, strict=True):
            found = index.match(tokens).of(A)[Tier.VRAM]
            assert found == leading(names, pool.told)
            assert found <= leading(names, pool.held)
        check(index)


def say(index: FleetIndex, *events: Stored | Removed) -> int:
    """How many of six tokens are held in VRAM then."""
    index.apply(A, events)
    return index.match(PROMPTS[0][:6]).of(A)[Tier.VRAM]


CHAIN = Stored((1, 2, 3), None, PROMPTS[0][:6], SIZE, Tier.VRAM, b"", ())
LAST = Stored((3,), 2, PROMPTS[0][4:6], SIZE, Tier.VRAM, b"", ())
GONE = Removed((3,), Tier.VRAM, None)


def test_copies_are_counted_up_to_a_bound() -> None:
    index, extra = FleetIndex(), MOST_COPIES + 5
    assert say(index, CHAIN, *[LAST] * extra) == 6
    assert index.stats().uncounted == 5
    assert say(index, *[GONE] * MOST_COPIES) == 6
    assert say(index, GONE) == 4
    assert say(index, GONE) == 4
    assert index.stats().unknown == 1


@pytest.mark.parametrize("end", [Removed((3,), None, None), Removed((2, 3), None, None)])
def test_copies_end_with_the_name(end: Removed) -> None:
    """Told again after it is gone, a block begins with one copy."""
    index = FleetIndex()
    say(index, CHAIN, LAST, LAST, end)
    assert say(index, CHAIN) == 6
    assert say(index, GONE) == 4


def test_other_tiers_and_meanings_have_no_copies() -> None:
    index, in_cpu = FleetIndex(), Stored((3,), 2, PROMPTS[0][4:6], SIZE, Tier.CPU, b"", ())
    say(index, CHAIN, in_cpu, in_cpu, Removed((3,), Tier.CPU, None))
    assert say(index, GONE) == 4
    say(index, CHAIN, LAST)
    say(index, Stored((3,), 2, [7, 7], SIZE, Tier.VRAM, b"", ()), GONE)  # it means another block now
    assert index.stats().worker_blocks == 2


def test_a_table_that_grows_keeps_copies() -> None:
    index, tokens = FleetIndex(), list(range(4000))
    say(index, CHAIN, LAST, LAST)
    index.apply(A, [Stored(tuple(range(100, 2100)), None, tokens, SIZE, Tier.VRAM, b"", ())])
    assert say(index, GONE, GONE) == 6
    assert say(index, GONE) == 4
