"""Many events at once leave the index as each by itself does."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.fleet import Cleared, FleetIndex, Removed, Source, Stored, Tier
from cairn.fleet.base import StoredMany, singly
from cairn.fleet.fair import FairLock
from cairn.fleet.names import SLOT_BITS, hashes_of

from .test_index import prompt
from .test_model import check

A, B = Source("a", 0), Source("b", 0)

#: Two prompts that part after two blocks, so that events meet what was stored before.
PROMPTS = ((0, 0, 0, 0, 0, 0, 0, 0), (0, 0, 1, 1, 0, 1, 0, 1))


def together(events: Sequence[Stored]) -> StoredMany:
    """Events of one size, tier and kind of copies as one."""
    first = events[0]
    names = hashes_of([one for event in events for one in event.hashes])
    assert names is not None
    stops = np.cumsum([len(event.hashes) for event in events])
    told = [(event.parent or 0, event.parent is None, stop) for event, stop in zip(events, stops, strict=True)]
    tokens = np.concatenate([np.array(event.tokens, np.uint32) for event in events])
    return StoredMany(
        names, np.array(told, np.uint64), tokens.reshape(-1, first.block_tokens), first.tier, first.copies
    )


@st.composite
def some_events(draw: Any) -> list[Stored]:
    """Of one size and tier. Names are few, so that they clash, come twice and mean another block; parents may be none
    that is held.
    """
    size, tier = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([Tier.VRAM, Tier.VRAM, Tier.CPU]))
    copies = draw(st.booleans())
    found = []
    for _ in range(draw(st.integers(1, 8))):
        tokens = draw(st.sampled_from(PROMPTS))
        count = len(tokens) // size
        first = draw(st.integers(0, count - 1))
        stop = draw(st.integers(first + 1, min(count, first + 4)))
        usual = [10 * PROMPTS.index(tokens) * (i > 1) + i + 100 * size for i in range(count)]
        names = [draw(st.sampled_from([name, name, name, name, name + 1, 500])) for name in usual]
        parent = None if not first else draw(st.sampled_from([usual[first - 1]] * 4 + [usual[0], 999]))
        found.append(
            Stored(
                tuple(names[first:stop]), parent, list(tokens[first * size : stop * size]), size, tier, b"", (), copies
            )
        )
    return found


others = st.one_of(
    st.builds(
        Removed,
        st.lists(st.integers(100, 120), min_size=1, max_size=4).map(tuple),
        st.sampled_from([None, Tier.VRAM]),
        st.none(),
    ),
    st.just(Cleared()),
)


def answers(index: FleetIndex) -> Any:
    matches = [index.match(list(tokens)) for tokens in PROMPTS]
    copies = {
        source: sorted((int(one["hash"]), int(one["next"]) >> SLOT_BITS) for one in member.names if one["next"])
        for source, member in index._ledger.members.items()
    }
    found = [{source: row.tolist() for source, row in zip(m.sources, m.tokens, strict=True)} for m in matches]
    return found, copies, index.stats()._replace(bytes=0), index._ledger.sizes


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([A, B]), some_events() | others), min_size=1, max_size=8), st.integers(1, 9))
def test_the_index_is_the_same(story: list[tuple[Source, Any]], batch: int) -> None:
    singles, many = FleetIndex(64), FleetIndex(64)
    many._ledger._batch = many._ledger._together = batch
    for source, told in story:
        events = told if isinstance(told, list) else [told]
        singles.apply(source, events)
        many.apply(source, [together(events)] if isinstance(told, list) else events)
    assert answers(singles) == answers(many)
    check(many)


def test_they_are_the_same_events() -> None:
    tokens = prompt(1, 6)
    events = [
        Stored((1, 2), None, tokens[:8].tolist(), 4, Tier.CPU, b"", ()),
        Stored((3,), 2, tokens[8:12].tolist(), 4, Tier.CPU, b"", ()),
        Stored((4, 5, 6), 9, tokens[12:].tolist(), 4, Tier.CPU, b"", ()),
    ]
    found = [(e.hashes, e.parent, list(e.tokens), e.tier) for e in singly([together(events)])]
    assert found == [(e.hashes, e.parent, e.tokens, e.tier) for e in events]


class Watched(FairLock):
    """Counts how often it is taken. wanted: somebody always waits for it."""

    def __init__(self, *, wanted: bool) -> None:
        super().__init__()
        self.taken, self._wanted = 0, wanted

    def __enter__(self) -> None:
        super().__enter__()
        self.taken += 1
        self.waiting[0] = self._wanted


@pytest.mark.parametrize(("wanted", "times"), [(False, 2), (True, 3)])
def test_a_long_one_makes_way_for_who_waits(wanted: bool, times: int) -> None:
    """Of 3,000 blocks 2,560 are as many as go together in an index of this size, and 1,024 where somebody waits."""
    index, tokens = FleetIndex(10_240), prompt(1, 3001)
    index.apply(A, [Stored((5000,), None, tokens[-4:].tolist(), 4, Tier.VRAM, b"", ())])
    index._ledger.lock = lock = Watched(wanted=wanted)
    events = [
        Stored(tuple(range(i + 1, i + 501)), i or None, tokens[4 * i : 4 * i + 2000].tolist(), 4, Tier.VRAM, b"", ())
        for i in range(0, 3000, 500)
    ]
    index.apply(A, [together(events)])
    assert lock.taken == times
    assert sum(index.match(tokens[:12_000]).of(A).values()) == 12_000
    check(index)


def test_a_long_one_goes_in_batches() -> None:
    """Longer than a lock is held."""
    index, tokens = FleetIndex(1 << 12), prompt(1, 3000)
    events = [
        Stored(tuple(range(i + 1, i + 501)), i or None, tokens[4 * i : 4 * i + 2000].tolist(), 4, Tier.VRAM, b"", ())
        for i in range(0, 3000, 500)
    ]
    index.apply(A, [together(events)])
    assert sum(index.match(tokens).of(A).values()) == 12_000
    assert index.stats().worker_blocks == 3000
    check(index)


def test_more_than_fits() -> None:
    index, tokens = FleetIndex(256), prompt(1, 1000)
    events = [
        Stored((i + 1,), i or None, tokens[4 * i : 4 * i + 4].tolist(), 4, Tier.VRAM, b"", ()) for i in range(1000)
    ]
    index.apply(A, [together(events)])
    stats = index.stats()
    assert 128 < stats.blocks <= 256
    assert stats.blocks + stats.evicted == 1000
    check(index)


def test_behind_a_name_that_is_not_taken_comes_an_orphan() -> None:
    """As if the events had come one by one: the first has no effect, so the second has no parent."""
    index, tokens = FleetIndex(64), prompt(1, 3)
    index.apply(A, [Stored((1, 2), None, tokens[:8].tolist(), 4, Tier.VRAM, b"", ())])
    again = Stored((11,), None, tokens[:4].tolist(), 4, Tier.VRAM, b"", ())
    behind = Stored((3,), 11, tokens[4:8].tolist(), 4, Tier.VRAM, b"", ())
    index.apply(A, [together([again, behind])])
    assert (index.stats().doubles, index.stats().orphans, index.stats().worker_blocks) == (1, 1, 2)


def test_a_name_that_moves_within_an_event() -> None:
    """The set of the block that loses it is free then, and must not be given to the next."""
    index, tokens = FleetIndex(64), prompt(1, 3).tolist()
    index.apply(A, [Stored((5, 5), None, tokens[:8], 4, Tier.VRAM, b"", ())])
    check(index)
    index.apply(A, [Cleared(), Stored((7, 1), None, tokens[:8], 4, Tier.VRAM, b"", ()), Removed((7,), None, None)])
    index.apply(A, [Stored((5, 5, 6), None, tokens, 4, Tier.CPU, b"", ())])
    check(index)
    assert (index.stats().doubles, index.stats().worker_blocks) == (1, 2)


def test_a_copy_is_of_its_moment() -> None:
    """Names that mean another block after it still mean the old one in it."""
    index, tokens = FleetIndex(1 << 13), prompt(1, 4000).tolist()
    names = tuple(range(1, 3001))
    index.apply(A, [Stored(names, None, tokens[:12_000], 4, Tier.VRAM, b"", ())])
    copy = index.copy(A)
    assert copy is not None
    assert index.cut(A, copy)
    index.apply(A, [together([Stored(names[::-1][:1000], None, tokens[12_000:], 4, Tier.VRAM, b"", ())])])
    other = FleetIndex(1 << 13)
    assert other.restore(A, copy.sizes, copy.count, held_back=False)
    for piece in copy.pieces():
        other.fill(A, piece)
    copy.close()
    other.show(A)
    assert sum(index.match(tokens[12_000:]).of(A).values()) == 4000
    assert sum(index.match(tokens).of(A).values()) == 8000
    assert sum(other.match(tokens).of(A).values()) == 12_000
