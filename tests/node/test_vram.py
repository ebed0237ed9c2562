"""The VRAM pool on the stand-in: what one process has stored every other reads, and nothing of it is wrong when its
owner dies, is taken for dead, comes back, or overwrites it.
"""

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cairn.config import load_config
from cairn.copy import Copier
from cairn.engine import CacheEngine
from cairn.engine.node_store import NodeWriting
from cairn.errors import ConfigError
from cairn.node import wire
from cairn.node.life import Life, process_token
from cairn.node.segments import path_of
from tests.engine.pages import SLOT, namespace, prompt, retrieved, stored

from .peer import Peer, keys_of, within
from .rig import TIMEOUT_S, ProcessNode, ThreadNode, address_in, segments, thread_node
from .vram_owner import vram_engine

BLOCKS, DRAM = 24, 80


class Owner:
    """An engine in a process of its own, see `vram_owner`."""

    def __init__(self, address: str, blocks: int = BLOCKS) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "tests.node.vram_owner", address, str(blocks)]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def tell(self, word: str, seed: int, length: int) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{word} {seed} {length}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ThreadNode]:
    one = ThreadNode(address_in(tmp_path), **{"storage.cpu.size": DRAM * SLOT, "node.lease_s": 30})
    assert one.node._segments
    name = one.node._segments.id
    yield one
    deadline = time.monotonic() + 10  # who has just said goodbye is not waiting for an answer
    while lives := {segment for segment in segments() if name in segment and ".life-" in segment}:
        assert time.monotonic() < deadline, f"a page outlives its donation: {lives}"
    one.close()
    assert not {segment for segment in segments() if name in segment}


@pytest.fixture
def engines(node: ThreadNode, tmp_path: Path) -> Iterator[Callable[..., CacheEngine]]:
    made: list[CacheEngine] = []

    def make(blocks: int = BLOCKS, **settings: Any) -> CacheEngine:
        made.append(vram_engine(address_in(tmp_path), blocks, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def owner(node: ThreadNode, tmp_path: Path) -> Iterator[Owner]:
    one = Owner(address_in(tmp_path))
    yield one
    one.kill()


def hits(engine: CacheEngine, tier: str) -> int:
    return int(engine.metrics.hit_tokens.value(tier=tier))


def misses(engine: CacheEngine, reason: str) -> int:
    return int(engine.metrics.miss_tokens.value(reason=reason))


def figures(engine: CacheEngine) -> dict[str, float]:
    engine._store._figures_at = 0.0  # type: ignore[attr-defined] # asked for anew
    tiers: Any = engine.get_stats()["tiers"]
    found: dict[str, float] = tiers["vram"]
    return found


def mappings() -> int:
    """Stand-ins' memory that this process has open."""
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)]  # noqa: PTH115, PTH208
    return sum("memfd:cairn-vram" in link for link in links)


def _exists(fd: str) -> bool:
    return Path(f"/proc/self/fd/{fd}").is_symlink()


# --- serving ----------------------------------------------------------------------------------------------------------


def test_own_vram_then_a_peers_then_dram(engines: Callable[..., CacheEngine], tmp_path: Path) -> None:
    first, second, third = engines(), engines(), engines(4)
    tokens = prompt(1, 42)
    key = [first.chain(tokens).key(block) for block in (0, 9)]
    assert [first.contains(one) for one in key] == [-1, -1]
    assert stored(first, tokens) == 40
    assert [third.contains(one) for one in key] == [0, 0]
    assert retrieved(second, tokens) == 40
    assert hits(second, "vram") == 40
    assert first.flush(10)
    assert first.metrics.stored_tokens.value(tier="vram") == 40
    assert first.metrics.stored_tokens.value(tier="dram") == 40, "written behind"
    # The head is in the third's own, the rest at a peer's.
    assert stored(third, tokens[:16]) == 16
    assert retrieved(third, tokens) == 40
    assert figures(third)["segments"] == 2
    with CacheEngine(namespace(), load_config(environ={}), node=address_in(tmp_path)) as plain:
        assert retrieved(plain, tokens) == 40, "who shares no VRAM reads DRAM"
        assert hits(plain, "dram") == 40
    first.close()
    assert [third.contains(one) for one in key] == [0, 1], "elsewhere now"
    assert retrieved(third, tokens) == 40
    assert (hits(third, "vram"), hits(third, "dram")) == (40 + 16, 24)


def test_what_does_not_fit_vram_goes_to_dram(engines: Callable[..., CacheEngine]) -> None:
    engine = engines(4)
    tokens = prompt(2, 80)
    assert stored(engine, tokens) == 80
    assert hits(engine, "vram") == 0
    assert retrieved(engine, tokens) == 80
    assert hits(engine, "dram") == 80
    assert stored(engine, tokens[:16]) == 16, "a shorter one fits"
    assert retrieved(engine, tokens) == 80
    assert hits(engine, "vram") == 16


def test_eviction_leaves_what_dram_has(engines: Callable[..., CacheEngine]) -> None:
    engine = engines(10)
    for seed in range(4):
        assert stored(engine, prompt(seed, 40)) == 40
        assert engine.flush(10)
    assert figures(engine)["evicted_blocks_total"] == 30
    assert [retrieved(engine, prompt(seed, 40)) for seed in range(4)] == [40] * 4
    assert (hits(engine, "vram"), hits(engine, "dram")) == (40, 120)


def test_layer_by_layer_and_in_tasks(engines: Callable[..., CacheEngine]) -> None:
    from tests.engine.pages import Pages

    first, second = engines(), engines()
    tokens, pages = prompt(3, 40), Pages()
    slots = pages.slots(40)
    pages.prefill(tokens, slots)
    kv = first.register_kv_caches(pages.tensors)
    store = first.store_layers(first.chain(tokens))
    assert store
    for layer in range(first.geometry.layers):
        store.put(layer, kv, slots)
    assert second.contains(second.chain(tokens).key(0)) == -1
    assert store.commit() == 10
    pages.clear()
    kv = second.register_kv_caches(pages.tensors)
    with second.stage(second.chain(tokens)) as stage:
        load = stage.load_layers(kv, slots)
        assert all(load.wait(layer, 10) for layer in range(second.geometry.layers))
    assert pages.holds(tokens, slots, np.ones(40, bool))
    assert hits(second, "vram") == 40
    pages.clear()
    task = second.get_async(tokens, slots)
    assert second.wait([task])[task].mask.all()
    assert pages.holds(tokens, slots, np.ones(40, bool))


def test_vram_needs_a_node_and_room_for_a_block(node: ThreadNode, tmp_path: Path) -> None:
    settings = {"storage.vram.size": SLOT, "storage.vram.device": "stand-in"}
    with pytest.raises(ConfigError, match=r"set node\.address"):
        CacheEngine(namespace(), load_config(environ={}, overrides=settings))
    with pytest.raises(ConfigError, match=r"storage\.vram\.size=100: must hold at least one KV block"):
        vram_engine(address_in(tmp_path), 1, **{"storage.vram.size": 100})


# --- owners that die --------------------------------------------------------------------------------------------------


def test_what_the_dead_had_is_not_handed_out(engines: Callable[..., CacheEngine], owner: Owner) -> None:
    """At once, though its lease of 30 s has not run out."""
    reader = engines()
    assert owner.tell("store", 1, 40) == 40
    tokens = prompt(1, 40)
    assert retrieved(reader, tokens) == 40
    assert hits(reader, "vram") == 40
    assert reader.contains(reader.chain(tokens).key(0)) == 0
    owner.kill()
    assert reader.contains(reader.chain(tokens).key(0)) == 1, "DRAM has it"
    assert retrieved(reader, tokens) == 40
    assert hits(reader, "dram") == 40
    assert figures(reader)["dead_segments_total"] == 1


def test_an_owner_that_dies_in_a_copy_is_a_miss(engines: Callable[..., CacheEngine], owner: Owner) -> None:
    reader = engines()
    assert owner.tell("store", 1, 40) == 40
    scatter = reader._copier.scatter

    def dies(*arguments: Any) -> None:
        scatter(*arguments)
        owner.kill()

    reader._copier.scatter = dies  # type: ignore[method-assign]
    assert loaded_at_least(reader, prompt(1, 40)) == 0
    assert misses(reader, "owner_gone") == 40
    reader._copier.scatter = scatter  # type: ignore[method-assign]
    assert retrieved(reader, prompt(1, 40)) == 40
    assert hits(reader, "dram") == 40


def loaded_at_least(engine: CacheEngine, tokens: Any) -> int:
    """How many tokens a retrieve reports; what it reports is not looked at."""
    from tests.engine.pages import Pages

    pages = Pages(1)
    slots = pages.slots(len(tokens))
    return int(np.count_nonzero(engine.retrieve(tokens, None, pages.tensors, slots)))


def test_an_owner_that_uses_its_memory_anew_is_a_miss(engines: Callable[..., CacheEngine]) -> None:
    """Its session ends while another reads; in its next one it overwrites the very slots."""
    owner, reader = engines(10), engines()
    assert stored(owner, prompt(1, 40)) == 40
    assert owner.flush(10)
    scatter = reader._copier.scatter

    def overwritten(*arguments: Any) -> None:
        relinked(owner)
        assert stored(owner, prompt(2, 40)) == 40
        scatter(*arguments)

    reader._copier.scatter = overwritten  # type: ignore[method-assign]
    assert loaded_at_least(reader, prompt(1, 40)) == 0
    assert misses(reader, "owner_gone") == 40
    reader._copier.scatter = scatter  # type: ignore[method-assign]
    assert retrieved(reader, prompt(2, 40)) == 40
    assert hits(reader, "vram") == 40


def relinked(engine: CacheEngine) -> None:
    client = engine._store._client  # type: ignore[attr-defined]
    client._found.clear()
    client.link._lost("the test says so")
    assert client.wait(10)


def test_slots_that_are_read_are_not_overwritten(engines: Callable[..., CacheEngine]) -> None:
    owner, reader = engines(10), engines()
    tokens = prompt(1, 40)
    assert stored(owner, tokens) == 40
    assert owner.flush(10)
    with reader.stage(reader.chain(tokens)):
        assert stored(owner, prompt(2, 40)) == 40, "in DRAM, as all slots of VRAM are pinned"
        assert owner.contains(owner.chain(prompt(2, 40)).key(0)) == 1
        assert retrieved(reader, tokens) == 40
    assert figures(reader)["pinned_blocks"] == 0, "asked on the reader's socket, behind what it gave back"
    assert stored(owner, prompt(2, 40)) == 40
    assert owner.contains(owner.chain(prompt(2, 40)).key(0)) == 0


def test_a_writer_of_the_session_before_is_waited_for(engines: Callable[..., CacheEngine]) -> None:
    """A thread that still copies under a lost session must not write where the next session's blocks are."""
    engine = engines(10)
    gather = engine._copier.gather
    entered, leave = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> None:
        entered.set()
        assert leave.wait(TIMEOUT_S)
        gather(*arguments)

    engine._copier.gather = slow  # type: ignore[method-assign]
    writer = threading.Thread(target=stored, args=(engine, prompt(1, 40)))
    writer.start()
    assert entered.wait(TIMEOUT_S)
    engine._copier.gather = gather  # type: ignore[method-assign]
    relinked(engine)
    assert stored(engine, prompt(2, 40)) == 40
    assert engine.contains(engine.chain(prompt(2, 40)).key(0)) == 1, "in DRAM until the other is out"
    leave.set()
    writer.join(TIMEOUT_S)
    assert engine.flush(10)
    assert stored(engine, prompt(2, 40)) == 40
    assert engine.contains(engine.chain(prompt(2, 40)).key(0)) == 0
    assert retrieved(engine, prompt(2, 40)) == 40


def test_mappings_go_with_the_nodes_word(engines: Callable[..., CacheEngine], owner: Owner) -> None:
    reader = engines()
    gc.collect()
    before = mappings()
    assert owner.tell("store", 1, 40) == 40
    assert retrieved(reader, prompt(1, 40)) == 40
    assert mappings() > before
    assert owner.process.stdin
    owner.process.stdin.close()
    assert owner.process.wait(TIMEOUT_S) == 0
    assert reader.contains(reader.chain(prompt(1, 40)).key(0)) == 1
    deadline = time.monotonic() + TIMEOUT_S
    while mappings() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mappings() == before


# --- the node ---------------------------------------------------------------------------------------------------------


def test_a_silent_readers_pins_are_taken_back(tmp_path: Path) -> None:
    settings = {"storage.cpu.size": DRAM * SLOT, "node.lease_s": 0.5}
    node = ThreadNode(address_in(tmp_path), **settings)
    try:
        with vram_engine(address_in(tmp_path), 10) as engine:
            tokens = prompt(1, 40)
            assert stored(engine, tokens) == 40
            silent = Peer(address_in(tmp_path)).hello()
            found = silent.ask(wire.TakeVram, 7, wire.raw_of(engine.chain(tokens).keys))
            assert isinstance(found, wire.TakenVram)
            assert len(found.parts) == 1
            assert figures(engine)["pinned_blocks"] == 10
            deadline = time.monotonic() + TIMEOUT_S
            while figures(engine)["pinned_blocks"] and time.monotonic() < deadline:
                pass
            assert figures(engine)["pinned_blocks"] == 0
            silent.close()
    finally:
        node.close()


def test_an_arena_that_is_still_being_pinned_does_not_keep_who_closes(
    node: ThreadNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second a GiB is minutes for a large host; once pinned it is given back."""
    begun, pinned, given_back = (threading.Event() for _ in range(3))

    def register(_: object, memory: object) -> None:
        begun.set()
        assert pinned.wait(30)

    monkeypatch.setattr(Copier, "register", register)
    monkeypatch.setattr(Copier, "release", lambda *_: given_back.set())
    engine = vram_engine(address_in(tmp_path), BLOCKS)
    assert begun.wait(30)
    closing = threading.Thread(target=engine.close, args=(0.1,))
    closing.start()
    closing.join(10)
    late = closing.is_alive()
    pinned.set()
    closing.join(30)
    assert not late
    assert given_back.wait(30)


def test_where_a_donation_cannot_be_taken_dram_is_used(
    engines: Callable[..., CacheEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose /dev/shm the arena has filled."""
    allocate = os.posix_fallocate

    def full(descriptor: int, *span: int) -> None:
        if ".life-" in os.readlink(f"/proc/self/fd/{descriptor}"):  # noqa: PTH115
            raise OSError(errno.ENOSPC, "no room")
        allocate(descriptor, *span)

    monkeypatch.setattr(os, "posix_fallocate", full)
    engine = engines()
    asked = asked_by(engine)
    for seed in (1, 2):
        assert stored(engine, prompt(seed, 40)) == 40
        assert engine.flush(10)
        assert retrieved(engine, prompt(seed, 40)) == 40
    assert hits(engine, "dram") == 80
    assert engine._store._client.losses == 0, "the session stands"  # type: ignore[attr-defined]
    assert asked.count("Donate") == 1, "a session asks once"
    assert not {segment for segment in segments() if ".life-" in segment}


def test_a_flush_does_not_wait_for_what_is_stored_meanwhile(engines: Callable[..., CacheEngine]) -> None:
    engine = engines(24)
    behind = engine._store._behind  # type: ignore[attr-defined]
    real, begun, leave = behind._move, threading.Semaphore(0), threading.Semaphore(0)

    def slow(offer: Any) -> None:
        begun.release()
        assert leave.acquire(timeout=TIMEOUT_S)
        real(offer)

    behind._move = slow
    assert stored(engine, prompt(1, 16)) == 16
    assert begun.acquire(timeout=TIMEOUT_S)
    assert stored(engine, prompt(2, 16)) == 16
    latest = behind._turns.latest
    assert stored(engine, prompt(3, 16)) == 16
    assert not behind.drain(0.0)
    leave.release(2)
    assert begun.acquire(timeout=TIMEOUT_S)
    assert begun.acquire(timeout=TIMEOUT_S), "the third is under way"
    assert behind._turns.over(latest)
    assert not behind._turns.over(behind._turns.latest)
    leave.release()
    assert behind.drain(TIMEOUT_S)
    assert retrieved(engine, prompt(2, 16)) == 16


def test_what_a_node_that_went_has_not_taken_is_counted(engines: Callable[..., CacheEngine]) -> None:
    """Of what goes from VRAM to DRAM: also the piece that it did not commit."""
    engine, tokens = engines(), prompt(1, 40)
    store: Any = engine._store
    write = store.write_dram

    def losing(*arguments: Any, **named: Any) -> NodeWriting:
        writing: NodeWriting = write(*arguments, **named)

        def commit(_: int) -> int:
            writing.lost = True
            return 0

        writing.commit = commit  # type: ignore[method-assign]
        return writing

    store.write_dram = losing
    stored(engine, tokens)
    assert store._behind.drain(10)
    assert engine.metrics.skipped_tokens.value(tier="dram", reason="node_away") == 40


def test_rules_of_calls(node: ThreadNode, tmp_path: Path) -> None:
    one = Peer(address_in(tmp_path)).hello()
    keys = wire.raw_of(keys_of(1, 4))
    found = one.ask(wire.ReserveVram, 1, keys)
    assert (found.first, bytes(found.rows)) == (0, b""), "it has donated nothing"
    assert one.ask(wire.TakeVram, 2, keys).parts == []
    assert isinstance(one.ask(wire.TakeVram, 2, keys), wire.Refused)
    assert one.ask(wire.Withdraw).pins == 0
    assert isinstance(one.ask(wire.Donate, 0, 4096, b"h", bytes(16)), wire.Refused)
    given = one.ask(wire.Donate, 4, 4096, b"h", bytes(16))
    assert isinstance(given, wire.Donated)
    again = one.ask(wire.Donate, 4, 4096, b"h", bytes(16))
    assert again.donation != given.donation
    assert len(wire.rows_of(one.ask(wire.ReserveVram, 3, keys).rows)) == 4
    assert one.commit(3, 4).new == 4
    assert one.ask(wire.TakeVram, 4, keys).parts == [], "nobody holds its page: it counts as dead"
    one.tell(wire.Bye(one.session))
    one.close()


def test_another_session_writes_to_a_donation_and_pins_it(node: ThreadNode, tmp_path: Path) -> None:
    """As vLLM's scheduler does with what its worker has donated."""
    worker, scheduler = (Peer(address_in(tmp_path)).hello() for _ in range(2))
    keys = wire.raw_of(keys_of(1, 4))
    given = worker.ask(wire.Donate, 4, 4096, b"h", process_token())
    assert isinstance(given, wire.Donated)
    life = Life(path_of(given.life), given.donation, process_token(), 4)
    life.hold()
    assert scheduler.ask(wire.ReserveVram, 1, keys).rows == b"", "its own session has donated nothing"
    assert len(wire.rows_of(scheduler.ask(wire.ReserveVram, 2, keys, given.donation).rows)) == 4
    assert scheduler.commit(2, 4).new == 4
    assert scheduler.ask(wire.Match, keys).own == 0
    found = scheduler.ask(wire.Match, keys, given.donation)
    assert (found.vram, found.own, found.parts) == (4, 4, [])
    # More than it has: nothing is pinned. All of it: at once.
    assert scheduler.ask(wire.Match, wire.raw_of(keys_of(1, 5)), given.donation, 3).parts == []
    [part] = scheduler.ask(wire.Match, keys, given.donation, 3).parts
    assert (part.donation, len(wire.rows_of(part.rows))) == (given.donation, 4)
    assert isinstance(scheduler.ask(wire.Match, keys, given.donation, 3), wire.Refused), "the number is in use"
    assert len(worker.ask(wire.ReserveVram, 1, wire.raw_of(keys_of(2, 1))).rows) == 0, "all slots are pinned"
    scheduler.tell(wire.Bye(scheduler.session))
    assert within(10, worker, lambda: worker.figures()["vram"]["pinned_blocks"] == 0)
    assert worker.ask(wire.Match, keys).own == 4, "it outlives who wrote there, whose pins are back"
    assert len(wire.rows_of(worker.ask(wire.ReserveVram, 2, wire.raw_of(keys_of(2, 1))).rows)) == 1, (
        "and has the pins back"
    )
    worker.tell(wire.Bye(worker.session))
    life.close()
    for one in (worker, scheduler):
        one.close()


def asked_by(engine: CacheEngine) -> list[str]:
    """What its store asks the node for from now on."""
    asked: list[str] = []
    link = engine._store._link()  # type: ignore[attr-defined]
    call = link.call
    link.call = lambda request: (asked.append(type(request).__name__), call(request))[1]
    return asked


def test_a_hit_that_is_all_in_vram_is_one_call_or_none(engines: Callable[..., CacheEngine]) -> None:
    engine = engines()
    tokens = prompt(1, 40)
    assert stored(engine, tokens) == 40
    assert engine.flush(10)
    asked = asked_by(engine)
    assert retrieved(engine, tokens) == 40
    assert asked == [], "who copies at once looks by himself"
    with engine.stage(engine.chain(tokens)):
        assert asked == ["Match"], "who may take his time has it pinned"
    assert retrieved(engine, prompt(2, 40)) == 0
    assert asked == ["Match", "Match"], "what he does not find he asks for"
    assert hits(engine, "vram") == 40
    assert figures(engine)["pinned_blocks"] == 0


def test_a_use_of_more_than_a_call_takes_is_told_up_to_there(
    engines: Callable[..., CacheEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines()
    assert stored(engine, prompt(1, 40)) == 40
    assert engine.flush(10)
    monkeypatch.setattr("cairn.engine.vram_pool.MAX_BLOCKS", 4)
    link, told = engine._store._link(), []  # type: ignore[attr-defined]
    tell = link.tell
    link.tell = lambda message: (told.append(message), tell(message))
    assert retrieved(engine, prompt(1, 40)) == 40
    assert [(type(one).__name__, len(one.keys)) for one in told] == [("Used", 4 * 16)]


def test_who_follows_what_is_asked_for_asks(engines: Callable[..., CacheEngine]) -> None:
    engine = engines()
    tokens = prompt(1, 40)
    assert stored(engine, tokens) == 40
    assert engine.flush(10)
    engine.watch()
    asked = asked_by(engine)
    assert retrieved(engine, tokens) == 40
    assert asked == ["Match"]


def test_a_peers_vram_is_read_while_the_node_is_stopped(tmp_path: Path) -> None:
    node = ProcessNode(address_in(tmp_path), **{"storage.cpu.size": DRAM * SLOT})
    with vram_engine(address_in(tmp_path), 10) as owner, vram_engine(address_in(tmp_path), 10) as reader:
        tokens = prompt(1, 40)
        assert stored(owner, tokens) == 40
        assert owner.flush(10)
        assert retrieved(reader, tokens) == 40
        node.process.send_signal(signal.SIGSTOP)
        assert retrieved(reader, tokens) == 40
        assert hits(reader, "vram") == 80
        node.process.send_signal(signal.SIGCONT)
    node.stop()


def test_what_is_overwritten_in_a_copy_is_a_miss(engines: Callable[..., CacheEngine]) -> None:
    owner, reader = engines(10), engines(10)
    assert stored(owner, prompt(1, 40)) == 40
    assert owner.flush(10)
    assert retrieved(reader, prompt(1, 40)) == 40, "mapped from now on"
    scatter = reader._copier.scatter

    def overwritten(*arguments: Any) -> None:
        assert stored(owner, prompt(2, 40)) == 40
        assert owner.contains(owner.chain(prompt(2, 40)).key(9)) == 0
        scatter(*arguments)

    reader._copier.scatter = overwritten  # type: ignore[method-assign]
    assert loaded_at_least(reader, prompt(1, 40)) == 0
    assert misses(reader, "evicted") == 40
    reader._copier.scatter = scatter  # type: ignore[method-assign]
    assert retrieved(reader, prompt(1, 40)) == 40
    assert hits(reader, "dram") == 40


def test_an_owner_waits_for_who_reads_without_a_pin(engines: Callable[..., CacheEngine], tmp_path: Path) -> None:
    owner, reader = engines(10), engines(10)
    assert stored(owner, prompt(1, 40)) == 40
    assert owner.flush(10)
    assert retrieved(reader, prompt(1, 40)) == 40
    scatter = reader._copier.scatter
    closing = threading.Thread(target=owner.close, args=(TIMEOUT_S,))

    donated = owner._store._vram._own[1]  # type: ignore[attr-defined]

    def closed(*arguments: Any) -> None:
        closing.start()
        deadline = time.monotonic() + TIMEOUT_S
        while not donated.over() and time.monotonic() < deadline:
            pass  # until the owner has taken it out of the pool
        assert donated.readers == 1
        scatter(*arguments)
        assert closing.is_alive(), "it waits until the reader has gone"

    reader._copier.scatter = closed  # type: ignore[method-assign]
    assert loaded_at_least(reader, prompt(1, 40)) == 0
    assert misses(reader, "owner_gone") == 40
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()


def test_an_owner_waits_for_them_without_a_node(tmp_path: Path) -> None:
    node = ProcessNode(address_in(tmp_path), **{"storage.cpu.size": DRAM * SLOT})
    with vram_engine(address_in(tmp_path), 10) as owner, vram_engine(address_in(tmp_path), 10) as reader:
        assert stored(owner, prompt(1, 40)) == 40
        assert owner.flush(10)
        assert retrieved(reader, prompt(1, 40)) == 40
        scatter = reader._copier.scatter
        donated = owner._store._vram._own[1]  # type: ignore[attr-defined]
        closing = threading.Thread(target=owner.close, args=(TIMEOUT_S,))

        def closed(*arguments: Any) -> None:
            node.kill()
            deadline = time.monotonic() + TIMEOUT_S
            while owner._store._link() and time.monotonic() < deadline:  # type: ignore[attr-defined]
                pass
            closing.start()
            while not donated.over() and time.monotonic() < deadline:
                pass
            closing.join(0.2)
            assert closing.is_alive(), "it waits until the reader has gone"
            scatter(*arguments)

        reader._copier.scatter = closed  # type: ignore[method-assign]
        assert loaded_at_least(reader, prompt(1, 40)) == 0
        closing.join(TIMEOUT_S / 2)
        assert not closing.is_alive()


def test_the_own_segment_leads_and_a_peers_follows(engines: Callable[..., CacheEngine]) -> None:
    owner, reader = engines(10), engines(10)
    tokens = prompt(1, 40)
    assert stored(owner, tokens) == 40
    assert stored(reader, tokens[:16]) == 16
    assert owner.flush(10)
    assert reader.flush(10)
    assert retrieved(reader, tokens) == 40, "mapped from now on"
    asked, copied = asked_by(reader), []
    scatter = reader._copier.scatter
    reader._copier.scatter = lambda *arguments: (copied.append(len(arguments[3])), scatter(*arguments))[1]  # type: ignore[method-assign]
    assert retrieved(reader, tokens) == 40
    assert (asked, copied) == ([], [4, 6])


@pytest.mark.parametrize("partly", [False, True])
def test_what_peers_read_is_what_the_policy_keeps(tmp_path: Path, partly: bool) -> None:
    """partly: the chain's end is nowhere, so that another call pins it."""
    address, settings = address_in(tmp_path), {"storage.vram.policy": "lru", "storage.cpu.size": DRAM * SLOT}
    with thread_node(address, **settings), vram_engine(address, 20) as owner, vram_engine(address, 4) as reader:
        for seed in (1, 2):
            assert stored(owner, prompt(seed, 40)) == 40
            assert owner.flush(10)
        assert retrieved(reader, prompt(1, 44 if partly else 40)) == 40
        assert hits(reader, "vram") == 40
        assert retrieved(reader, prompt(1, 44 if partly else 40)) == 40, "now without a question, if it is whole"
        assert figures(reader), "behind what it has said of that"
        assert stored(owner, prompt(3, 40)) == 40
        keys = [owner.chain(prompt(seed, 40)).key(9) for seed in (1, 2, 3)]
        assert [owner.contains(key) for key in keys] == [0, 1, 0]


def test_the_next_node_gets_the_segment_anew(tmp_path: Path) -> None:
    settings = {"storage.cpu.size": DRAM * SLOT}
    first = ProcessNode(address_in(tmp_path), **settings)
    with vram_engine(address_in(tmp_path), 10) as engine, vram_engine(address_in(tmp_path), 10) as reader:
        tokens = prompt(1, 40)
        assert stored(engine, tokens) == 40
        old = engine._store._vram._own[1]  # type: ignore[attr-defined]
        watched = Life(old._life.path, old.number, bytes(16), 10)
        first.kill()
        assert retrieved(reader, tokens) == 0
        for one in (engine, reader):
            one._store._client._found.clear()  # type: ignore[attr-defined]
        second = ProcessNode(address_in(tmp_path), **settings)
        for one in (engine, reader):
            assert one._store._client.wait(60)  # type: ignore[attr-defined]
        assert retrieved(reader, tokens) == 0
        assert not watched.over(), "a dead node ends nothing"
        assert stored(engine, tokens) == 40
        assert watched.over(), "its owner does, before it writes there anew"
        assert retrieved(reader, tokens) == 40
        assert hits(reader, "vram") == 40
    second.stop()
