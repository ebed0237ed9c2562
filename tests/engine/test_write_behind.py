"""Write-behind: a drain waits for what was offered before it, for all of that, and for nothing that comes later."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.engine.write_behind import WriteBehind
from cairn.index import LRU, Reservation
from cairn.kv import Keys
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.tier.base import Outcomes, Rows, Tier
from cairn.tier.dram import DramTier
from tests.index.test_model import chain_of

BLOCK = 4096
paths = st.lists(st.integers(0, 1), min_size=1, max_size=7).map(tuple)


class Slow(Tier):
    """Writes when it is told to, in any order."""

    name = "slow"

    def __init__(self, pack_blocks: int) -> None:
        self.pack_blocks = pack_blocks
        self.written: set[bytes] = set()
        self.pending: list[tuple[Keys, Future[Outcomes]]] = []
        self.broken = False

    def match(self, keys: Keys) -> int:
        return next((i for i, key in enumerate(keys) if key.tobytes() not in self.written), len(keys))

    def write(self, keys: Keys, first: int, rows: Rows, **_: Any) -> "Future[Outcomes]":
        if self.broken:
            raise RuntimeError("can't start new thread")
        future: Future[Outcomes] = Future()
        self.pending.append((keys[first : first + len(rows.ids)].copy(), future))
        return future

    def finish(self, which: int) -> None:
        keys, future = self.pending.pop(which % len(self.pending))
        self.written |= {key.tobytes() for key in keys}
        future.set_result([None] * len(keys))

    def read(self, *_: Any, **__: Any) -> "Future[Outcomes]":
        raise NotImplementedError

    def touch(self, keys: Keys) -> None: ...

    def remove(self, key: Keys) -> int:
        raise NotImplementedError

    def sync(self, timeout: float) -> bool:
        return True

    def watch(self) -> None: ...

    def stats(self) -> Mapping[str, float]:
        return {}

    def close(self, timeout: float) -> None: ...


class Rig:
    def __init__(self, pack_blocks: int = 1, limit: int = 4, **more: Any) -> None:
        self.dram = DramTier(BLOCK, 64 * BLOCK, LRU)
        self.lower = Slow(pack_blocks)
        self.metrics = Metrics()
        self.behind = WriteBehind(
            self.dram, self.lower, limit_blocks=limit, block_tokens=4, metrics=self.metrics, **more
        )

    def store(self, path: tuple[int, ...]) -> Keys:
        keys = chain_of(path, collide=False)
        writing = Reservation(self.dram.index, keys)
        writing.commit(len(writing.rows))
        writing.end()
        self.behind.offer(keys, b"")
        return keys


@given(
    st.lists(st.one_of(paths, st.integers(0, 9), st.just("drain")), min_size=2, max_size=40),
    st.sampled_from([1, 2]),
    st.sampled_from([0.0, 1e-9, 1000.0]),
)
@settings(deadline=None)
def test_a_drain_is_over_with_what_was_offered_before(steps: list[Any], pack: int, linger_s: float) -> None:
    """Paths are offered, numbers finish a write, and from time to time somebody drains."""
    rig = Rig(pack, linger_s=linger_s)
    behind, lower = rig.behind, rig.lower
    offered: list[Keys] = []
    drains: list[tuple[int, list[Keys]]] = []
    for step in steps:
        if step == "drain":
            behind._draining += 1  # as `drain`, which waits
            drains.append((behind._turns.latest, list(offered)))
            behind.pump()
        elif isinstance(step, int):
            if lower.pending:
                lower.finish(step)
        else:
            offered.append(rig.store(step))
        for latest, before in drains:
            if behind._turns.over(latest):
                assert all(lower.match(keys) == len(keys) for keys in before), "it has not waited for all"
    behind._draining += 1
    behind.pump()
    while lower.pending:
        lower.finish(0)
    assert all(lower.match(keys) == len(keys) for keys in offered)
    assert behind._turns.over(behind._turns.latest)
    assert behind.waiting_blocks == 0
    assert not behind._waiting
    assert not behind._turns._pieces
    assert rig.dram.index.pinned == 0


def test_a_drain_does_not_wait_for_what_comes_after() -> None:
    rig = Rig(limit=1)
    rig.store((0,))
    begun, done = threading.Event(), []

    def drain() -> None:
        begun.set()
        done.append(rig.behind.drain(30))

    thread = threading.Thread(target=drain)
    thread.start()
    assert begun.wait(30)
    while not rig.behind._draining:
        pass
    for path in ((1,), (2,), (3,)):
        rig.store(path)
    rig.lower.finish(0)
    thread.join(30)
    assert done == [True]
    assert rig.behind.waiting_blocks == 2
    assert len(rig.lower.pending) == 1


def test_chains_that_a_tier_has_no_room_for_do_not_take_turns_for_ever() -> None:
    """Each piece of one chain takes the place of the end of the other, which would then be written again."""
    rig = Rig(limit=1)
    chains = [rig.store((i,) * 6) for i in range(2)]
    written = 0
    while rig.lower.pending and written < 100:
        keys, _ = rig.lower.pending[0]
        [other] = (chain for chain in chains if not (chain == keys[0]).all(axis=1).any())
        if len(rig.lower.written) == 6:
            rig.lower.written.remove(other[rig.lower.match(other) - 1].tobytes())
        rig.lower.finish(0)
        written += 1
    assert written < 30
    assert rig.behind.drain(0.0)
    assert not rig.behind._turns._pieces
    assert sum(rig.lower.match(keys) for keys in chains) == 6
    assert rig.metrics.skipped_tokens.value(tier="slow", reason="evicted") > 0


@pytest.mark.parametrize("waits", [False, True])
def test_who_stops_is_not_waited_for(waits: bool) -> None:
    rig = Rig(limit=1)
    rig.store((0,))
    if waits:
        rig.store((1,))
    rig.behind.stop()
    assert not rig.behind.drain(0.0), "one is being written"
    rig.lower.finish(0)
    assert rig.behind.drain(0.0)


def test_who_stops_does_not_say_that_all_was_written() -> None:
    rig = Rig(limit=1)
    for path in ((0,), (1,)):
        rig.store(path)
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(rig.behind.drain(30)))
    thread.start()
    while not rig.behind._draining:
        pass
    rig.behind.stop()
    rig.lower.finish(0)
    thread.join(30)
    assert done == [False]


def test_what_is_skipped_is_not_waited_for() -> None:
    rig = Rig(limit=1, worth=lambda *_: False)
    rig.store((0,))
    assert rig.behind.drain(0.0)
    assert not rig.lower.pending
    other = Rig(limit=1)
    other.store((0,))
    keys = other.store((1,))
    other.dram.index.remove(keys[-1])
    other.lower.finish(0)
    assert other.behind.drain(0.0), "it was evicted before its turn"
    assert np.count_nonzero(other.lower.match(keys)) == 0


def test_a_tier_that_breaks_is_counted_and_written_to_again() -> None:
    rig = Rig(limit=2)
    rig.lower.broken = True
    rig.store((0, 0, 0))  # in somebody's step: it hears nothing of it
    assert rig.behind.drain(0.0)
    skipped = rig.metrics.skipped_tokens
    assert (
        skipped.value(tier="slow", reason=Reason.IO_ERROR) + skipped.value(tier="slow", reason=Reason.NO_PARENT) == 12
    )
    assert rig.dram.index.pinned == 0
    rig.lower.broken = False
    keys = rig.store((1,))
    rig.lower.finish(0)
    assert rig.lower.match(keys) == 1


def test_the_end_of_a_chain_that_grows_belongs_to_its_turn() -> None:
    rig = Rig(pack_blocks=2, limit=2, linger_s=1e-9)
    rig.store((1, 1))
    rig.store((0,))
    keys = rig.store((0, 0, 0))
    latest = rig.behind._turns.latest
    rig.lower.finish(0)
    rig.lower.finish(0)
    assert rig.lower.match(keys) == 2
    assert not rig.behind._turns.over(latest), "its last block waits"
    rig.behind.pump()
    rig.lower.finish(0)
    assert rig.lower.match(keys) == 3
    assert rig.behind._turns.over(latest)
