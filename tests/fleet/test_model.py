"""The index against a dict, over random events of several sources, tiers, block sizes and namespaces."""

import hashlib
from collections import Counter
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cairn.fleet import Cleared, Event, FleetIndex, Removed, Source, Stored, Tier
from cairn.fleet.blocks import LIVE
from cairn.fleet.names import slot_at

from .model import Model, blocks_of

pytestmark = pytest.mark.slow

SIZES = (1, 3)
NAMESPACES = (b"", b"", b"salt", bytes(16))

#: Few things to speak of, so that what is said meets what was said before.
prompts = st.tuples(st.sampled_from([(0,) * 9, (0, 0, 0, 1, 1, 1, 0, 1, 0)]), st.integers(1, 9)).map(
    lambda pair: list(pair[0][: pair[1]])
)
tiers = st.sampled_from(list(Tier))
sources = st.sampled_from([Source("a", 0), Source("a", 1), Source("b", 0)])
#: Mostly the group that was stored.
groups = st.sampled_from([None, None, None, 0])


class Fleet(RuleBasedStateMachine):
    """Rules speak as engines do: each source has its own hashes, of which `hash_space` says how many there are."""

    capacity: ClassVar[int] = 1000
    hash_spaces: ClassVar[tuple[int, ...]] = (9, 1 << 64)
    exact: ClassVar[bool] = True

    @initialize(space=st.data(), crowd=st.sampled_from([0, 0, 62, 130]), as_bytes=st.booleans())
    def start(self, space: Any, crowd: int, as_bytes: bool) -> None:
        self.index, self.model = FleetIndex(self.capacity), Model()
        self.space = space.draw(st.sampled_from(self.hash_spaces))
        self.as_bytes = as_bytes
        for i in range(crowd):  # so that sets have several words, and sources numbers beyond the first
            self.say(Source(f"crowd{i}", 0), Stored((i,), None, [9], 1, Tier.VRAM, b"", ()))

    def say(self, source: Source, event: Event) -> None:
        self.index.apply(source, [event])
        self.model.apply(source, event)

    def hash_of(self, source: Source, block: Any, double: bool) -> Any:
        digest = hashlib.blake2b(repr((source.rank, block, double)).encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "big") % self.space
        return number.to_bytes(32, "big") if self.as_bytes else number

    def named(
        self, source: Source, tokens: list[int], size: int, namespace: bytes, extra: Any, double: bool = False
    ) -> list[Any]:
        blocks = blocks_of(namespace, tokens, size, extra)
        return [self.hash_of(source, block, double) for block in blocks]

    @rule(
        source=sources,
        tokens=prompts,
        size=st.sampled_from(SIZES),
        first=st.integers(0, 4),
        tier=tiers,
        namespace=st.sampled_from(NAMESPACES),
        picture=st.sampled_from([None, None, None, None, 0, 2]),
        double=st.booleans(),
        copies=st.booleans(),
    )
    def store(
        self,
        source: Source,
        tokens: list[int],
        size: int,
        first: int,
        tier: Tier,
        namespace: bytes,
        picture: int | None,
        double: bool,
        copies: bool,
    ) -> None:
        count = len(tokens) // size
        if first >= count:
            return
        extra = tuple(b"cat" if i == picture else None for i in range(count))
        hashes = self.named(source, tokens, size, namespace, extra, double and self.exact)
        event = Stored(
            tuple(hashes[first:]),
            hashes[first - 1] if first else None,
            np.array(tokens, np.uint32)[first * size : count * size] if double else tokens[first * size : count * size],
            size,
            tier,
            namespace,
            extra[first:] if picture is not None else (),
            copies,
        )
        self.say(source, event)

    def some_names(self, source: Source, picks: list[int]) -> list[Any]:
        """Of what the source holds, and now and then what it does not."""
        names = list(self.model.held.get(source, {}))
        return [
            names[pick % len(names)] if names and pick < 90 else self.hash_of(source, pick, False) for pick in picks
        ]

    @rule(source=sources, picks=st.lists(st.integers(0, 99), max_size=5), tier=tiers)
    def name_in_another_tier(self, source: Source, picks: list[int], tier: Tier) -> None:
        names = tuple(self.some_names(source, picks))
        self.say(source, Stored(names, None, [], 0, tier, b"", ()))

    @rule(
        source=sources,
        picks=st.lists(st.integers(0, 99), min_size=1, max_size=3),
        tier=st.one_of(st.none(), tiers, st.just(Tier.VRAM)),
        group=groups,
    )
    def remove(self, source: Source, picks: list[int], tier: Tier | None, group: int | None) -> None:
        self.say(source, Removed(tuple(self.some_names(source, picks)), tier, group))

    @rule(source=sources, how=st.sampled_from(["event", "source", "instance"]))
    def forget(self, source: Source, how: str) -> None:
        if how == "event":
            self.say(source, Cleared())
            return
        self.index.drop(source if how == "source" else source.instance)
        for rank in [source.rank] if how == "source" else range(2):
            self.model.drop(Source(source.instance, rank))

    @rule(instances=st.sampled_from([["a"], []]))
    def match_some(self, instances: list[str]) -> None:
        tokens = [0] * 9
        found, all_of_them = self.index.match(tokens, instances), self.index.match(tokens)
        assert set(found.sources) == {one for one in all_of_them.sources if one.instance in instances}
        assert all(found.of(source) == all_of_them.of(source) for source in found.sources)

    @invariant()
    def finds_what_the_model_finds(self) -> None:
        if not hasattr(self, "index"):
            return
        for tokens in ([0] * 9, [0, 0, 0, 1, 1, 1, 0, 1]):
            for namespace in NAMESPACES[1:]:
                self.compare(tokens, namespace)

    def compare(self, tokens: list[int], namespace: bytes) -> None:
        expected = self.model.match(tokens, namespace)
        found = self.index.match(tokens, namespace=namespace)
        assert set(found.sources) == set(expected)
        for i, source in enumerate(found.sources):
            alone, reach = expected[source]
            if self.exact:
                assert found.tokens[i].tolist() == alone
                assert found.reach[i].tolist() == reach
            else:
                assert (found.tokens[i] <= alone).all()
                assert (found.reach[i] <= reach).all()

    @invariant()
    def everything_adds_up(self) -> None:
        if not hasattr(self, "index"):
            return
        check(self.index)
        stats = self.index.stats()
        assert stats.blocks <= self.capacity
        if self.exact:
            held = self.model.held.values()
            assert stats.worker_blocks == sum(map(len, held))
            assert stats.blocks == len({block for names in held for block, _ in names.values()})
            assert stats.sources == len(held)


def check(index: FleetIndex) -> None:
    """A source has one name for each block that it holds and none for others; blocks and sets add up."""
    ledger = index._ledger
    records, holders = ledger.blocks.records, ledger.holders
    live = np.flatnonzero(records["state"] == LIVE)
    set_of = dict(zip(live.tolist(), records["holders"][live].tolist(), strict=True))
    used = Counter(set_of.values())
    sets, by_source = [*used], {}
    for source, member in ledger.members.items():
        named = [slot_at(member.names, at) for at in np.flatnonzero(member.names["next"])]
        assert len(named) == len(set(named)) == member.count
        by_source[source] = set(named)
        first, shift = len(Tier) * (member.number // 64), np.uint64(member.number % 64)  # as `Holders` has them
        bits = (holders.rows[sets, first : first + len(Tier)] >> shift) & np.uint64(1)
        held = {one for one, held in zip(sets, bits.any(axis=1), strict=True) if held}
        assert {slot for slot, one in set_of.items() if one in held} == set(named)
    assert set().union(*by_source.values()) == set_of.keys()
    assert np.count_nonzero(ledger.blocks.table) == len(live) == index.stats().blocks
    assert len(used) == index.stats().sets == np.count_nonzero(holders.table)
    assert all(holders.sets[one]["refs"] == count for one, count in used.items())


class Crowded(Fleet):
    """More than fits: what is found is right, and never more than the capacity."""

    capacity = 12
    hash_spaces = (1 << 64,)
    exact = False


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestCrowded = Crowded.TestCase
TestCrowded.settings = settings(max_examples=30, stateful_step_count=50, deadline=None)
