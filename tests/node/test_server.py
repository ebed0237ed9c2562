"""What the node does for clients that break rules, fall silent, or die."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.config import load_config
from cairn.engine import CacheEngine
from cairn.errors import InputError, LockedError, StorageError
from cairn.kv import KVGeometry, Namespace
from cairn.node import session, wire
from cairn.node.segments import Segments, sweep
from cairn.node.server import Node
from cairn.observe.reasons import Reason
from tests.engine.pages import GEOMETRY, SLOT, namespace, prompt, retrieved, stored

from .peer import Peer, keys_of, within
from .rig import ProcessNode, ThreadNode, address_in, segments, thread_node

LEASE_S = 0.5
ROWS = 20


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    where = address_in(tmp_path_factory.mktemp("node"))
    with thread_node(where, **{"storage.cpu.size": ROWS * SLOT, "node.lease_s": LEASE_S}):
        yield where


@pytest.fixture
def peers(address: str) -> Iterator[Callable[[], Peer]]:
    made: list[Peer] = []

    def make() -> Peer:
        made.append(Peer(address))
        return made[-1].hello()

    yield make
    for one in made:
        one.tell(wire.Bye(one.session))
        one.close()


# --- frames -----------------------------------------------------------------------------------------------------------


def broken_frames() -> list[tuple[bytes, ...]]:
    head = bytes([wire.VERSION])
    good = wire.encode(wire.Match(1, 0, bytearray(16)))
    huge = msgspec.msgpack.encode([2, 1, 0, bytes(wire.MAX_BLOCKS * 16 + 16)])
    return [
        (b"",),
        (head,),
        (b"\xff" * 40,),
        (head + b"\xc1",),
        (head + msgspec.msgpack.encode([99, 1, 0]),),
        (head + msgspec.msgpack.encode([2, -1, 0, b""]),),
        (head + msgspec.msgpack.encode([2, 1, 0, "text"]),),
        (head + huge,),
        (good[:-3],),
        (head + b"\x91" * 5000,),
        (good, good),
    ]


@pytest.mark.parametrize("frames", broken_frames(), ids=range(len(broken_frames())))
def test_malformed_frames_cost_themselves(peers: Callable[[], Peer], frames: tuple[bytes, ...]) -> None:
    one = peers()
    answer = one.raw(*frames)
    assert isinstance(answer, wire.Refused)
    assert "\n" not in answer.why
    assert one.match(keys_of(0, 3)) == 0


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes(raw: bytes, head: bool) -> None:
    for decode in (wire.decode_request, wire.decode_reply):
        try:
            decode((bytes([wire.VERSION]) if head else b"") + raw)
        except wire.WireError:
            continue


def test_a_frame_that_is_too_large_is_not_taken_in(address: str, peers: Callable[[], Peer]) -> None:
    one, flood = peers(), Peer(address)
    flood.socket.send(bytes(wire.MAX_FRAME + 1))
    assert not flood.socket.poll(200)
    flood.close()
    assert one.match(keys_of(0, 3)) == 0


@pytest.mark.parametrize(
    "what",
    [
        lambda one: one.ask(wire.Match, bytearray(15)),
        lambda one: one.commit(77, 1),
        lambda one: (one.reserve(5, keys_of(1, 4)), one.commit(5, 5))[1],
        lambda one: (one.take(6, keys_of(1, 4)), one.take(6, keys_of(1, 4)))[1],
    ],
)
def test_rules_of_calls(peers: Callable[[], Peer], what: Callable[[Peer], wire.Reply]) -> None:
    one = peers()
    assert isinstance(what(one), wire.Refused)
    assert one.match(keys_of(0, 3)) == 0


def test_who_has_all_he_may_is_given_no_more_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine with thousands of requests that wait for their blocks."""
    monkeypatch.setattr(session, "MAX_NUMBERS", 2)
    with thread_node(address_in(tmp_path), **{"storage.cpu.size": ROWS * SLOT}):
        config = load_config(environ={}, overrides={"engine.planner": False, "node.timeout_s": 2})
        with CacheEngine(namespace(), config, node=address_in(tmp_path)) as engine:
            tokens = prompt(3, 8)
            assert stored(engine, tokens) == 8
            stages = [engine.stage(engine.chain(tokens)) for _ in range(3)]
            assert stored(engine, prompt(4, 8)) == 0
            assert [stage.wait() for stage in stages] == [8, 8, 0]
            assert engine._store._client.losses == 0  # type: ignore[attr-defined]
            for stage in stages:
                stage.release()
            assert engine.metrics.miss_tokens.value(reason=Reason.NO_SLOT) == 8
            assert stored(engine, prompt(4, 8)) == 8
            assert retrieved(engine, tokens) == 8


def test_a_deadline_longer_than_the_node_takes_costs_no_session(tmp_path: Path) -> None:
    with thread_node(address_in(tmp_path), **{"storage.cpu.size": ROWS * SLOT}):
        config = load_config(environ={}, overrides={"engine.planner": False, "node.timeout_s": 2})
        with CacheEngine(namespace(), config, node=address_in(tmp_path)) as engine:
            tokens = prompt(3, 8)
            assert stored(engine, tokens) == 8
            assert retrieved(engine, tokens, timeout=1e6) == 8
            assert engine.flush(1e6)
            assert engine._store._client.losses == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("sound", [True, False])
def test_a_pool_whose_client_does_not_come_again_is_in_nobodys_way(tmp_path: Path, sound: bool) -> None:
    """It was killed while its pool was being opened. sound: whether that could be opened."""
    settings = {"storage.cpu.size": ROWS * SLOT, "node.pools": 1, "storage.disk.path": tmp_path / "d"}
    if not sound:
        (tmp_path / "d").write_bytes(b"no directory")
    with thread_node(address_in(tmp_path), **settings) as running:
        gone, other = Peer(address_in(tmp_path)), Peer(address_in(tmp_path))
        assert isinstance(gone.ask(wire.Hello, GEOMETRY), wire.Wait)
        gone.close()
        (opening,) = running.node._pools._opening.values()
        assert (opening.exception(60) is None) == sound
        another = msgspec.structs.replace(GEOMETRY, layers=3)
        while isinstance(found := other.ask(wire.Hello, another), wire.Wait):
            pass
        if sound:
            assert isinstance(found, wire.Welcome)
        else:
            assert isinstance(found, wire.Refused)
            assert "in use" not in found.why
        other.close()


def test_a_bug_costs_one_call_and_is_counted(tmp_path: Path) -> None:
    with thread_node(address_in(tmp_path), **{"storage.cpu.size": ROWS * SLOT}) as running:
        peer = Peer(address_in(tmp_path)).hello()
        running.node._handlers[wire.Match] = lambda *_: 1 / 0
        refused = peer.ask(wire.Match, wire.raw_of(keys_of(50, 1)))
        assert isinstance(refused, wire.Refused)
        assert "its log says how" in refused.why
        assert peer.figures()["node"]["failed_calls_total"] == 1
        peer.close()


def test_another_version_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with thread_node(address_in(tmp_path), **{"storage.cpu.size": ROWS * SLOT}):
        monkeypatch.setattr(wire, "_HEAD", bytes([wire.VERSION + 1]))
        with pytest.raises(StorageError, match=rf"speaks version {wire.VERSION + 1}.*run the same release") as caught:
            CacheEngine(namespace(), load_config(environ={}), node=address_in(tmp_path))
        assert "\n" not in str(caught.value)


# --- leases -----------------------------------------------------------------------------------------------------------


def test_what_a_silent_client_holds_is_taken_back(peers: Callable[[], Peer]) -> None:
    other, silent = peers(), peers()
    silent.store(keys_of(10, 6))
    silent.take(1, keys_of(10, 6))
    silent.reserve(2, keys_of(11, 4))
    entrance = silent.entrance()
    assert other.busy() == (6, 4)
    assert within(10, other, lambda: other.busy() == (0, 0))
    assert not entrance.enter(), "it may not touch them any more"
    assert isinstance(silent.commit(2, 4), wire.Gone), "nor publish what it had begun"
    assert other.match(keys_of(11, 4)) == 0
    assert not silent.gate.exists()
    assert other.figures()["node"]["expired_sessions_total"] >= 1


def test_rows_are_nobody_elses_while_a_silent_client_may_write(peers: Callable[[], Peer]) -> None:
    """A writer that is stopped in its copy goes on after its lease: into rows that still are its own."""
    other, writer = peers(), peers()
    entrance, memory = writer.entrance(), writer.memory()
    mine = writer.reserve(1, keys_of(20, 8))
    assert entrance.enter()
    lost = lambda: other.figures()["node"]["lingering_sessions"] == 1  # noqa: E731
    assert within(10, other, lost)
    # Everything the pool can give goes to others, and they fill it.
    theirs = other.reserve(2, keys_of(21, ROWS))
    assert len(theirs) == ROWS - len(mine)
    assert not set(theirs.tolist()) & set(mine.tolist())
    memory[theirs] = 7
    memory[mine] = 1
    assert (memory[theirs] == 7).all()
    other.tell(wire.End(other.session, [2]))
    entrance.leave()
    assert within(10, other, lambda: other.busy() == (0, 0))
    assert len(other.reserve(3, keys_of(22, ROWS))) == ROWS


def test_what_is_read_stays_while_a_silent_client_may_read(peers: Callable[[], Peer]) -> None:
    other, reader = peers(), peers()
    keys = keys_of(30, 5)
    rows = reader.store(keys)
    memory = reader.memory()
    memory[rows] = 3
    reader.take(1, keys)
    entrance = reader.entrance()
    assert entrance.enter()
    assert within(10, other, lambda: other.figures()["node"]["lingering_sessions"] == 1)
    memory[other.reserve(2, keys_of(31, ROWS))] = 9
    assert (memory[rows] == 3).all()
    other.tell(wire.End(other.session, [2]))
    entrance.leave()
    assert within(10, other, lambda: other.busy() == (0, 0))


def test_bye_gives_everything_back(peers: Callable[[], Peer], address: str) -> None:
    other, leaving = peers(), Peer(address).hello()
    leaving.store(keys_of(40, 3))
    leaving.take(1, keys_of(40, 3))
    leaving.reserve(2, keys_of(41, 3))
    leaving.tell(wire.Bye(leaving.session))
    assert within(5, other, lambda: other.busy() == (0, 0))
    leaving.close()


# --- pools ------------------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_an_idle_pool_gives_way_and_one_in_use_does_not(tmp_path: Path) -> None:
    wide = Namespace(model="w", geometry=KVGeometry(layers=3, kv_heads=1, head_dim=8, dtype="float16", block_tokens=4))
    where, config = address_in(tmp_path), load_config(environ={})
    before = segments()
    with thread_node(where, **{"storage.cpu.size": ROWS * SLOT}):
        with CacheEngine(namespace(), config, node=where) as engine:
            stored(engine, prompt(1, 20))
            with pytest.raises(StorageError, match=r"raise node\.pools"):
                CacheEngine(wide, config, node=where)
        with CacheEngine(wide, config, node=where):
            arenas = [name for name in segments() - before if ".arena-" in name]
            assert len(arenas) == 1
    with (
        thread_node(where, **{"storage.cpu.size": ROWS * SLOT, "node.pools": 2}),
        CacheEngine(namespace(), config, node=where) as engine,
        CacheEngine(wide, config, node=where) as other,
    ):
        for one in (engine, other):
            dram = one.get_stats()["tiers"]["dram"]  # type: ignore[index,call-overload]
            assert dram["capacity_blocks"] == ROWS / 2  # type: ignore[index,call-overload]
    assert segments() <= before  # of others' nodes some may have gone


# --- the process ------------------------------------------------------------------------------------------------------


def test_one_node_an_address(tmp_path: Path) -> None:
    with thread_node(address_in(tmp_path)):
        with pytest.raises(LockedError, match="in use by process"):
            ThreadNode(address_in(tmp_path))
        assert (tmp_path / "node.sock").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "node.sock").exists()
    with thread_node(address_in(tmp_path)):
        assert (tmp_path / "node.sock").exists()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "ipc://relative", "ipc:///" + "x" * 101, "ipc:///dev/null"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises((InputError, StorageError)):
        Node(load_config(environ={}), address, lambda *_: None)  # type: ignore[arg-type,return-value]


@pytest.mark.alone
def test_a_dead_nodes_memory_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    before = segments()
    with CacheEngineAt(tmp_path) as engine:
        dead = ProcessNode(address_in(tmp_path), **{"storage.cpu.size": ROWS * SLOT})
        linked(engine)
        stored(engine, prompt(1, 40))
        left = segments() - before
        # Who was slow to answer had to link again, and has another gate.
        assert {name.partition(".")[2].rstrip("0123456789") for name in left} == {"lock", "arena-", "gate-"}
        dead.kill()
        assert segments() - before == left
        living = Segments()
        try:
            sweep()
            assert segments() - before == {f"cairn-node-{living.id}.lock"}
        finally:
            living.close()
    assert segments() <= before


def test_clients_find_the_next_node_and_its_disk_is_warm(tmp_path: Path) -> None:
    settings_of = {"storage.cpu.size": ROWS * SLOT, "storage.disk.path": tmp_path / "d", "storage.disk.size": 1 << 20}
    tokens = prompt(5, 40)
    with CacheEngineAt(tmp_path) as engine:
        assert retrieved(engine, tokens) == 0
        first = ProcessNode(address_in(tmp_path), **settings_of)
        linked(engine)
        assert stored(engine, tokens) == 40
        assert engine.flush(10)
        first.kill()
        started = time.monotonic()
        assert [retrieved(engine, tokens) for _ in range(3)] == [0, 0, 0]
        assert time.monotonic() - started < 10
        assert engine.metrics.miss_tokens.value(reason="node_away") > 0
        second = ProcessNode(address_in(tmp_path), **settings_of)
        linked(engine)
        assert engine.get_stats()["tiers"]["node"]["losses_total"] == 1  # type: ignore[index,call-overload]
        assert retrieved(engine, tokens, timeout=10) == 40
        assert engine.metrics.hit_tokens.value(tier="disk") == 40
        assert retrieved(engine, tokens) == 40
        logged = second.stop()
    assert "stopped" in logged


class CacheEngineAt(CacheEngine):
    """An engine that does not wait for its node."""

    def __init__(self, home: Path) -> None:
        overrides = {"engine.timeout_s": 0.05, "engine.planner": False}
        super().__init__(namespace(), load_config(environ={}, overrides=overrides), node=address_in(home))


def linked(engine: CacheEngine) -> None:
    """Waits until the engine has a session at a node that lives."""
    client = engine._store._client  # type: ignore[attr-defined]
    deadline = time.monotonic() + 60
    while engine.get_stats()["tiers"]["node"].get("sessions") != 1:  # type: ignore[index,call-overload,union-attr]
        client._found.wait(0.02)
        assert time.monotonic() < deadline, "no node is found"


def test_a_client_that_waits_for_blocks_from_disk(tmp_path: Path) -> None:
    """Blocks that come up while the client waits are told as they come."""
    size = {"storage.cpu.size": 12 * SLOT, "storage.disk.path": tmp_path / "d", "storage.disk.size": 1 << 20}
    first, second = prompt(1, 40), prompt(2, 40)
    with thread_node(address_in(tmp_path), **size), CacheEngineAt(tmp_path) as engine:
        linked(engine)
        assert stored(engine, first) == 40
        assert engine.flush(10)
        assert stored(engine, second) == 40, "evicts the first"
        assert engine.flush(10)
        assert retrieved(engine, first, timeout=10) == 40
        assert engine.metrics.hit_tokens.value(tier="disk") >= 28
        loads = engine.metrics.transfer_bytes.value(tier="disk", direction="load")
        assert loads == engine.metrics.hit_tokens.value(tier="disk") / 4 * GEOMETRY.block_bytes


def test_numbers_of_rows_are_those_of_the_arena(peers: Callable[[], Peer]) -> None:
    one = peers()
    rows = one.store(keys_of(50, 4))
    held = one.take(1, keys_of(50, 6))
    assert isinstance(held, wire.Progress)
    assert held.settled
    assert held.tiers == [("dram", 4)]
    assert np.array_equal(wire.rows_of(held.rows), rows)
    assert rows.max() < one.welcome.slots


def test_opaque_blocks_are_refused_by_a_node_that_compresses(tmp_path: Path) -> None:
    """Only the node knows what it does to blocks, and only the client what is in them."""
    where = address_in(tmp_path)
    with thread_node(where, **{"storage.cpu.size": ROWS * SLOT, "compression.algorithm": "lossless"}):
        with pytest.raises(StorageError, match=r"opaque pages.*set compression.algorithm to none"):
            CacheEngine(namespace(layout="vllm:cpu:default:tp1:pp2"), node=where)
        with CacheEngine(namespace(), node=where) as engine:
            assert stored(engine, prompt(1, 8)) == 8
            assert retrieved(engine, prompt(1, 8)) == 8
