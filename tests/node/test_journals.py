"""Engines that follow a node's tiers: whoever applies what one is told has what the node holds, and nothing twice."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.config import load_config
from cairn.engine import CacheEngine
from cairn.engine.node_journal import NodeJournal
from cairn.index.slots import RESIDENT
from cairn.node import following, wire
from cairn.node.client import Link
from tests.engine.pages import SLOT, namespace, prompt, retrieved, stored

from .peer import Peer, keys_of
from .rig import ThreadNode, address_in, thread_node

TIERS: Final = ("dram", "disk")
PROMPTS: Final = [prompt(seed, 4 * blocks) for seed in range(4) for blocks in (2, 3, 6)]


class Listener:
    """An engine, and what a listener to its events would believe."""

    def __init__(self, address: str) -> None:
        overrides = {"engine.planner": False, "engine.timeout_s": 10, "node.timeout_s": 2}
        self.engine = CacheEngine(namespace(), load_config(environ={}, overrides=overrides), node=address)
        self.journals = self.engine.watch()
        self.blocks: dict[str, set[bytes]] = {tier: set() for tier in TIERS}
        self.kept: dict[str, set[bytes]] = {tier: set() for tier in TIERS}

    def read(self, tier: str, unknown: Callable[[bytes], bool] = lambda _: False) -> int:
        """Takes in what has come; keys that are `unknown` are silenced. Returns how much that was."""
        journal, blocks = self.journals[tier], self.blocks[tier]
        changes = journal.changes()
        for key in changes.removed:
            blocks.remove(key.tobytes())
        new = [key.tobytes() for key in changes.stored]
        assert not blocks & {*new}, "told twice"
        quiet = np.array([unknown(key) for key in new], np.bool_)
        journal.silence(changes.slots[quiet])
        blocks |= {key for key, silent in zip(new, quiet, strict=True) if not silent}
        return len(changes.removed) + len(new)

    def agrees(self, node: ThreadNode) -> None:
        """Once everything is mentioned, and read, it knows exactly what the tiers hold."""
        client = self.engine._store._client  # type: ignore[attr-defined]
        waiting, session = threading.Event(), -1
        for tier in TIERS:
            for _ in range(1000):
                if client.links != session:  # also where a busy machine has cost it its session meanwhile
                    session = client.links
                    for one in PROMPTS:
                        self.engine.lookup(one)
                self.read(tier)
                if self.blocks[tier] == held(node, tier):
                    break
                waiting.wait(0.01)
            assert self.blocks[tier] == held(node, tier), tier


def held(node: ThreadNode, tier: str) -> set[bytes]:
    """What a tier of the node's only pool really holds, read from its index."""
    (pool,) = node.node._pools
    store: Any = pool.store
    slots = (store.dram.index if tier == "dram" else store._lower[0]._index)._slots
    live = slots[slots["state"] == RESIDENT]
    return {key.tobytes() for key in np.stack([live["key0"], live["key1"]], axis=1)}


@contextmanager
def two_engines() -> Iterator[tuple[ThreadNode, list[Listener]]]:
    """On a node whose DRAM holds few prompts, and whose disk some more."""
    with tempfile.TemporaryDirectory(prefix="cairn-") as name:
        home = Path(name)
        size: dict[str, Any] = {"storage.cpu.size": 12 * SLOT, "storage.disk.threads": 2}
        size |= {"storage.disk.path": home / "d", "storage.disk.size": 128 << 10}
        with thread_node(address_in(home), **size) as node:
            listeners = [Listener(address_in(home)) for _ in range(2)]
            try:
                yield node, listeners
            finally:
                for one in listeners:
                    one.engine.close()


def lose(one: Listener) -> None:
    """Its session ends, and another begins."""
    client = one.engine._store._client  # type: ignore[attr-defined]
    client._found.clear()
    client.link._lost("the test says so")
    assert client.wait(60)


def test_a_session_is_followed_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what is matched first would not be mentioned, and its children would be told without it."""
    begin, found = NodeJournal.begin, []
    with two_engines() as (node, (one, other)):
        stored(one.engine, PROMPTS[2])

        def used(journal: NodeJournal, link: Link) -> None:
            found.append(other.engine.lookup(PROMPTS[2]))
            begin(journal, link)

        monkeypatch.setattr(NodeJournal, "begin", used)
        lose(other)
        assert found == [0, 0]
        assert one.engine.flush(10)
        other.agrees(node)


STEP = st.tuples(
    st.sampled_from(["store", "store", "retrieve", "read", "read", "read", "clear", "lose"]),
    st.integers(0, 1),
    st.integers(0, len(PROMPTS) - 1),
)


@settings(max_examples=6, deadline=None)
@given(st.lists(STEP, max_size=25))
def test_each_knows_what_the_tiers_hold(steps: list[tuple[str, int, int]]) -> None:
    with two_engines() as (node, listeners):
        for step, who, which in steps:
            one = listeners[who]
            if step == "store":
                stored(one.engine, PROMPTS[which])
            elif step == "retrieve":
                retrieved(one.engine, PROMPTS[which])
            elif step == "read":
                for tier in TIERS:
                    one.read(tier, lambda key: key[0] % 3 == which % 4)  # noqa: B023 - called at once
            elif step == "clear":
                for tier in TIERS:
                    one.journals[tier].clear()
                    one.blocks[tier].clear()
            else:
                lose(one)
        assert listeners[0].engine.flush(10)
        for one in listeners:
            one.agrees(node)


def test_a_long_difference_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_PART", 2)
    with two_engines() as (node, (one, other)):
        stored(one.engine, PROMPTS[2])
        assert one.engine.flush(10)
        for listener in (one, other):
            listener.agrees(node)
            assert len(listener.blocks["dram"]) == 6


def test_a_reader_that_is_slow_is_told_the_difference() -> None:
    """Nothing piles up for it: what came and went meanwhile is not mentioned at all."""
    with two_engines() as (node, (one, other)):
        for round_ in range(4):
            for i in range(len(PROMPTS)):
                stored(one.engine, PROMPTS[i])
                if round_ == 3:
                    one.read("dram")
        number = other.engine._store._client.link.welcome.session  # type: ignore[attr-defined]
        session = node.node._sessions[number]
        told = sum(len(part.stored) // 16 for part in session.following["dram"]._parts)
        assert told <= 12, "more is kept for a reader than the tier has rows"
        for listener in (one, other):
            listener.agrees(node)


def test_nobody_knows_what_a_lost_node_holds(tmp_path: Path) -> None:
    with thread_node(address_in(tmp_path), **{"storage.cpu.size": 12 * SLOT}) as node:
        one = Listener(address_in(tmp_path))
        stored(one.engine, PROMPTS[2])
        stored_blocks = held(node, "dram")
        waiting = threading.Event()
        while one.blocks["dram"] != stored_blocks:
            one.read("dram")
            waiting.wait(0.01)
    while one.blocks["dram"]:
        one.read("dram")
        waiting.wait(0.01)
    one.engine.close()


def test_a_session_that_is_over_takes_no_journal_from_the_next() -> None:
    """Whoever clears a journal may have looked up the session just before it was lost, and another stood."""
    with two_engines() as (node, (one, _)):
        lost = one.engine._store._client.link  # type: ignore[attr-defined]
        lose(one)
        one.journals["dram"].begin(lost)  # type: ignore[attr-defined]
        stored(one.engine, PROMPTS[2])
        one.agrees(node)


def test_what_is_silenced_was_told_in_its_session() -> None:
    """Not by the next, which has told the same rows meanwhile: their end would be told to nobody."""
    with two_engines() as (node, (one, _)):
        journal, waiting = one.journals["dram"], threading.Event()
        stored(one.engine, PROMPTS[2])
        while not len((changes := journal.changes()).stored):
            waiting.wait(0.01)
        assert len(changes.stored) == 6
        lose(one)
        one.engine.lookup(PROMPTS[2])
        while journal._arrived is None:  # type: ignore[attr-defined]
            waiting.wait(0.01)
        journal.silence(changes.slots)
        while len(one.blocks["dram"]) < 6:
            one.read("dram")
            waiting.wait(0.01)
        for tokens in PROMPTS:
            stored(one.engine, tokens)
        one.agrees(node)


def test_rules_of_following(tmp_path: Path) -> None:
    """A client that breaks them has an error, and the others their node."""
    with thread_node(address_in(tmp_path), **{"storage.cpu.size": 12 * SLOT}):
        one, other = Peer(address_in(tmp_path)).hello(), Peer(address_in(tmp_path)).hello()
        one.tell(wire.Follow(one.session, 7, "no such tier"))
        one.tell(wire.Follow(one.session, 8, "dram"))
        for rows in ([12], [-1]):
            one.tell(wire.Silence(one.session, 8, wire.raw_of(np.array(rows, np.int32))))
            answer = one.reply()
            assert isinstance(answer, wire.Refused)
            assert "of a tier that has 12" in answer.why
        one.tell(wire.Silence(one.session, 8, bytearray(3)))
        assert isinstance(one.reply(), wire.Refused)
        one.tell(wire.Silence(one.session, 9, bytearray(4)))  # of a number that is over: nothing
        assert other.match(keys_of(0, 3)) == 0
        for peer in (one, other):
            peer.close()
