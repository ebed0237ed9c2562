"""The peer tier and who answers it, in one process, over a transport that fails as it is told."""

import ctypes
import itertools
import math
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zmq

from cairn.config import load_config
from cairn.engine.local import open_local
from cairn.engine.pool import open_pool
from cairn.errors import CairnError
from cairn.kv import CANONICAL, Keys
from cairn.node.lending import Lending
from cairn.node.peer_service import PeerService
from cairn.node.pools import Pool, directory_of
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.plan import CostModel
from cairn.tier import pace
from cairn.tier.base import Outcomes, Rows
from cairn.tier.peer import Limits, Peers, PeerTier
from cairn.tier.peer.wire import Find, Found, Keypair, Lent, decode_reply, encode
from cairn.transport import Read, Transport
from tests.tier.remote.servers import until
from tests.tier.rig import GEOMETRY, PAGE, content, memory, prompt, soon

KEYPAIR = Keypair("a secret of many letters")
NAME = directory_of(GEOMETRY, CANONICAL)
SLOTS = 64


class Here(Transport):
    """Reads memory of this process, if it is served; `fault` may spoil it."""

    endpoint = "here"
    guarded = False

    def __init__(self) -> None:
        self.served: list[range] = []
        self.fault: Callable[[Sequence[Read]], Reason | None] = lambda _: None

    def serve(self, memory: npt.NDArray[np.uint8]) -> None:
        self.served.append(range(memory.ctypes.data, memory.ctypes.data + memory.nbytes))

    def withdraw(self, memory: npt.NDArray[np.uint8]) -> None:
        self.served = [one for one in self.served if one.start != memory.ctypes.data]

    def read(self, endpoint: str, reads: Sequence[Read], *, deadline: float) -> Reason | None:
        for address, into in reads:
            if not any(address in one for one in self.served):
                return Reason.IO_ERROR
            into[:] = ctypes.string_at(address, len(into))
        return self.fault(reads)

    def close(self) -> None:
        self.served.clear()


class Rig:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = load_config(environ={}, overrides={"storage.cpu.size": SLOTS * PAGE})
        self.pool = Pool(config, GEOMETRY, CANONICAL, f"test-{uuid.uuid4().hex}", open_pool, lambda _: None)
        self.pools = [self.pool]
        self.transport = Here()
        self.lending = Lending(self.transport, lambda: self.pools)
        self.service = PeerService("tcp://127.0.0.1:0", KEYPAIR, self.lending)
        self.peers = Peers(KEYPAIR)
        self.peers.replace([self.service.address])
        self.tier = self.make_tier()

    def make_tier(self, limits: Limits = Limits(10.0, 10.0)) -> PeerTier:  # noqa: B008 - immutable
        return PeerTier(self.peers, self.transport, NAME, GEOMETRY.block_bytes, limits)

    def close(self) -> None:
        self.tier.close(10)
        self.service.close()
        self.peers.close()
        self.pool.close(10)

    @property
    def index(self) -> Any:
        return self.pool.store.dram.index

    def store(self, keys: Keys) -> None:
        writing = self.pool.store.write(keys, namespace=bytes(16))
        for row, key in zip(writing.rows, keys[writing.first :], strict=True):
            self.pool.store.dram.memory[row, : GEOMETRY.block_bytes] = content(key)
        writing.commit(len(writing.rows))
        writing.end()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(monkeypatch)
    yield rig
    rig.close()


def ask(tier: PeerTier, keys: Keys) -> int:
    answer = tier.ask(keys, deadline=soon())
    if answer is not None:
        answer.result(30)
    return tier.match(keys)


def read(tier: PeerTier, keys: Keys, first: int = 0) -> Outcomes:
    """Whatever is said to be read must be right."""
    rows = Rows(memory(len(keys) - first), np.arange(len(keys) - first, dtype=np.int32)[::-1].copy())
    outcomes = tier.read(keys, first, rows, deadline=soon()).result(30)
    for key, row, outcome in zip(keys[first:], rows.ids, outcomes, strict=True):
        if outcome is None:
            assert np.array_equal(rows.memory[row, : GEOMETRY.block_bytes], content(key)), "wrong bytes were served"
    return outcomes


def at_rest(rig: Rig) -> None:
    until(lambda: not rig.index.pinned, "leases are given back")


def test_what_a_node_holds_is_found_and_read(rig: Rig) -> None:
    keys = prompt(1, 20)
    rig.store(keys[:12])
    assert rig.tier.match(keys) == 0  # nobody has been asked
    assert ask(rig.tier, keys) == 12
    assert [rig.tier.match(keys[:n]) for n in (0, 1, 5, 12)] == [0, 1, 5, 12]
    assert rig.tier.ask(keys, deadline=soon()) is None  # it is known for a while
    assert read(rig.tier, keys[:12]) == [None] * 12
    at_rest(rig)  # more than a quarter is not lent
    assert read(rig.tier, keys[:12], 7) == [None] * 5
    assert read(rig.tier, keys[:13]) == [Reason.EVICTED] * 13
    assert ask(rig.tier, prompt(2, 3)) == 0
    at_rest(rig)
    stats = rig.tier.stats()
    assert (stats["read_blocks"], stats["evicted_total"], stats["lookups_total"]) == (17, 13, 2)


def test_what_was_not_there_is_asked_about_again_as_soon_as_is_wanted(rig: Rig) -> None:
    """At once, where an engine waits for what another is storing."""
    keys, waits = prompt(1, 4), rig.make_tier(Limits(10.0, 10.0, absent_s=0.0))
    try:
        assert [ask(tier, keys) for tier in (rig.tier, waits)] == [0, 0]
        rig.store(keys)
        assert [ask(tier, keys) for tier in (rig.tier, waits)] == [0, 4]
    finally:
        waits.close(10)


def test_a_peer_that_has_registered_no_address_costs_the_others_nothing(rig: Rig) -> None:
    keys = prompt(1, 4)
    rig.store(keys)
    rig.peers.replace(["tcp://", "nonsense", rig.service.address])
    assert ask(rig.tier, keys) == 4
    assert read(rig.tier, keys) == [None] * 4
    assert rig.tier.stats()["failed_lookups_total"] == 1
    at_rest(rig)


@pytest.mark.parametrize("more", [True, False])
def test_what_a_peer_says_unasked_is_no_answer_to_the_next(more: bool) -> None:
    """As a second message, or as a second part of the first."""

    def answers(number: int) -> list[list[bytes]]:
        right, wrong = encode(Found(number)), encode(Found(1_000 + number))
        return [[right, wrong]] if more else [[right], [wrong]]

    with answering(answers) as peers:
        (peer,) = peers.all()
        for number in range(1, 6):
            assert peers.call(peer, Find(NAME, bytearray()), soon()) == Found(number)
            time.sleep(0.1)


def test_a_peer_that_talks_nonsense_is_left_alone() -> None:
    with answering(lambda _: [[b"nonsense"]]) as peers:
        (peer,) = peers.all()
        said = [peers.call(peer, Find(NAME, bytearray()), soon()) for _ in range(4)]
        assert said == [Reason.TIMEOUT] * 3 + [Reason.BREAKER_OPEN]


@contextmanager
def answering(answers: Callable[[int], list[list[bytes]]]) -> Iterator[Peers]:
    """One peer, which sends these messages for the first call, the second, ..."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    KEYPAIR.guard(router, server=True)
    port = router.bind_to_random_port("tcp://127.0.0.1")

    def serve() -> None:
        with suppress(zmq.ContextTerminated):
            for number in itertools.count(1):
                who = router.recv_multipart()[0]
                for message in answers(number):
                    router.send_multipart([who, *message])
        router.close(0)

    thread = threading.Thread(target=serve)
    thread.start()
    peers = Peers(KEYPAIR)
    peers.replace([f"tcp://127.0.0.1:{port}"])
    try:
        yield peers
    finally:
        peers.close()
        context.term()
        thread.join()


def test_a_peer_that_was_slow_once_does_not_end_all_short_questions(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs keeps a lookup until its deadline. When it has gone, peers are asked again for what that is not
    worth, and nobody waits for it."""
    tier = rig.make_tier(Limits(10.0, 0.5))
    with socket.create_server(("127.0.0.1", 0)) as mute:
        rig.peers.replace([rig.service.address, f"tcp://127.0.0.1:{mute.getsockname()[1]}"])
        ask(tier, prompt(1, 4))
    rig.peers.replace([rig.service.address])
    assert tier.ask(prompt(2, 4), deadline=soon(), worth_s=0.05) is None
    assert tier.stats()["lookups_total"] == 1
    monkeypatch.setattr(pace, "AGAIN_S", 0.0)
    tier._pace.asked()  # as long ago as that

    def pays() -> bool:
        return tier.ask(prompt(random.randrange(1 << 30), 4), deadline=soon(), worth_s=0.05) is not None

    until(pays, "short lookups pay again")
    tier.close(10)


def test_what_went_since_it_was_asked_about_is_a_miss(rig: Rig) -> None:
    keys = prompt(1, 8)
    rig.store(keys)
    assert ask(rig.tier, keys) == 8
    rig.index.remove(keys[5])
    assert read(rig.tier, keys) == [None] * 5 + [Reason.EVICTED] * 3
    assert rig.tier.match(keys) == 5
    at_rest(rig)


def test_whatever_the_transport_does_no_block_is_wrong(rig: Rig) -> None:
    """It fails, gives other bytes, gives none; or rows are written anew while they are read, as after a lease."""
    numbers, keys = random.Random(0), prompt(1, 10)
    rig.store(keys)
    rows = rig.pool.store.dram.memory

    def fault(reads: Sequence[Read]) -> Reason | None:
        for read in reads:
            if numbers.random() < 0.3:
                read.into[numbers.randrange(len(read.into))] ^= 1 << numbers.randrange(8)
        return numbers.choice([None, None, None, Reason.IO_ERROR, Reason.TIMEOUT])

    rig.transport.fault = fault
    seen: set[Reason | None] = set()
    for _ in range(60):
        rig.peers.replace([])
        rig.peers.replace([rig.service.address])  # without the breaker's rest
        tier = rig.make_tier()
        assert ask(tier, keys) == 10
        seen.update(read(tier, keys))
        tier.close(10)
        at_rest(rig)
    assert seen == {None, Reason.CORRUPT, Reason.IO_ERROR, Reason.TIMEOUT}

    def reused(reads: Sequence[Read]) -> None:
        for read in reads[3:]:
            read.into[:] = bytes(len(read.into))

    rig.transport.fault = reused
    assert ask(rig.tier, keys) == 10
    assert read(rig.tier, keys) == [None] * 3 + [Reason.CORRUPT] * 7
    assert len(rows) == SLOTS
    at_rest(rig)


def test_who_cannot_be_read_from_is_left_alone(rig: Rig) -> None:
    """Though he answers."""
    keys = prompt(1, 2)
    rig.store(keys)
    rig.transport.fault = lambda _: Reason.IO_ERROR
    for _ in range(3):
        assert ask(rig.tier, keys) == 2
        assert read(rig.tier, keys) == [Reason.IO_ERROR] * 2
    assert rig.tier.match(keys) == 0
    assert rig.tier.ask(keys, deadline=soon()) is None
    assert rig.tier.stats()["resting_peers"] == 1
    rig.transport.fault = lambda _: None
    until(lambda: ask(rig.tier, keys) == 2 and read(rig.tier, keys) == [None] * 2, "it is tried again")


def test_who_does_not_answer_is_left_alone(rig: Rig) -> None:
    """And costs the others nothing."""
    keys, tier = prompt(1, 3), rig.make_tier(Limits(10.0, 0.5))
    rig.store(keys)
    assert ask(rig.tier, keys) == 3  # whom it is connected to
    rig.peers.replace([rig.service.address, "tcp://127.0.0.1:9"])
    away = rig.peers.all()[1]
    for number in range(2, 5):
        assert away.ready
        assert ask(tier, prompt(number, 3)) == 0
    assert not away.ready
    assert (tier.stats()["peers"], tier.stats()["failed_lookups_total"]) == (2, 3)
    until(lambda: ask(tier, keys) == 3, "the other one answers")
    assert read(tier, keys) == [None] * 3
    tier.close(10)


def test_no_more_than_a_part_is_lent_and_not_forever(rig: Rig) -> None:
    keys = prompt(1, 40)
    rig.store(keys)
    lent = rig.lending.lend(NAME, keys, 60.0)
    assert (len(lent.rows) // 4, rig.index.pinned) == (SLOTS // 4, SLOTS // 4)
    assert rig.lending.lend(NAME, keys, 60.0).rows == b""
    rig.lending.give_back(lent.lease)
    rig.lending.give_back(lent.lease)  # once is enough
    assert rig.index.pinned == 0
    rig.lending.lend(NAME, keys[:4], 0.001)
    until(lambda: rig.index.pinned == 0, "a lease ends by itself")
    assert rig.lending.figures() == {"leases": 1, "lent_blocks_total": SLOTS // 4 + 4}
    assert rig.lending.lend("another", keys, 1.0).rows == b""


def test_an_arena_is_served_while_its_pool_is_there(rig: Rig) -> None:
    until(lambda: len(rig.transport.served) == 1, "the arena is served")
    rig.pools.clear()
    until(lambda: not rig.transport.served, "it is withdrawn")
    assert ask(rig.tier, prompt(1, 3)) == 0


@pytest.mark.parametrize(
    ("frame", "secret"),
    [
        (b"", ""),
        (b"\x01garbage", ""),
        (b"\x63" + encode(Find(NAME, bytearray(16)))[1:], ""),
        (encode(Find(NAME, bytearray(15))), ""),
        (encode(Find(NAME, bytearray(16))), "another secret than theirs"),
    ],
    ids=["empty", "malformed", "another version", "half a key", "another secret"],
)
def test_who_is_not_understood_gets_no_answer(rig: Rig, frame: bytes, secret: str) -> None:
    context = zmq.Context()
    sockets: list[Any] = [context.socket(zmq.DEALER) for _ in range(2)]
    try:
        for socket, keypair in zip(sockets, (Keypair(secret) if secret else KEYPAIR, KEYPAIR), strict=True):
            keypair.guard(socket, server=False)
            socket.connect(rig.service.address)
        sockets[0].send(frame)
        for _ in range(3):  # the others are answered, and by then he would have been
            sockets[1].send(encode(Find(NAME, bytearray(16))))
            assert sockets[1].poll(30_000)
            assert decode_reply(sockets[1].recv()) == Found(0)
        assert not sockets[0].poll(50)
    finally:
        context.destroy(linger=0)


def test_nonsense_of_a_peer_is_a_miss(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = prompt(1, 4)
    rig.store(keys)
    assert ask(rig.tier, keys) == 4
    for rows, sums in ((bytes(16), bytes(63)), (bytes(20), bytes(80)), (bytes(15), bytes(64)), (bytes(12), bytes(64))):
        answer = Lent(1, "here", 0, PAGE, rows, sums)
        monkeypatch.setattr(rig.lending, "lend", lambda *_, answer=answer: answer)
        assert read(rig.tier, keys) == [Reason.FOREIGN] * 4
    monkeypatch.setattr(rig.lending, "lend", lambda *_: Lent(1, "here", 4096, PAGE, bytes(16), bytes(64)))
    assert read(rig.tier, keys) == [Reason.IO_ERROR] * 4


def test_the_answer_to_another_question_is_none(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right bytes with right checksums, of other blocks."""
    keys, others = prompt(1, 4), prompt(2, 4)
    rig.store(keys)
    rig.store(others)
    assert ask(rig.tier, keys) == 4
    lend = rig.lending.lend
    monkeypatch.setattr(rig.lending, "lend", lambda pool, _, seconds: lend(pool, others, seconds))
    assert read(rig.tier, keys) == [Reason.CORRUPT] * 4


@pytest.mark.parametrize(("protocol", "order"), [("tcp", "disk peer remote"), ("rdma", "peer disk remote")])
def test_the_faster_one_is_searched_first(rig: Rig, tmp_path: Path, protocol: str, order: str) -> None:
    """And a lookup waits for all who can be asked."""
    overrides = {
        "storage.cpu.size": SLOTS * PAGE,
        "storage.disk.path": tmp_path / "disk",
        "storage.disk.size": "1MiB",
        "storage.remote.url": f"file://{tmp_path}/remote",
        "node.peers.protocol": protocol,
    }
    config, keys = load_config(environ={}, overrides=overrides), prompt(1, 3)
    rig.store(keys)
    store = open_local(config, GEOMETRY, CANONICAL, Metrics(), CostModel(), None, rig.tier)
    try:
        answer = store.ask(keys, deadline=soon(), worth_s=math.inf)
        assert answer is not None
        answer.result(30)
        assert store.match(keys).below[order.split().index("peer")] == ("peer", 3)
        assert [tier for tier, _ in store.match(keys).below] == order.split()
        remote = dict(store._metrics.tiers()["remote"])
        assert (remote["lookups_total"], remote["round_trips_total"] > 0) == (1, True)
    finally:
        store.close(10)


def test_what_begins_too_late_is_not_begun(rig: Rig) -> None:
    keys = prompt(1, 2)
    rig.store(keys)
    assert ask(rig.tier, keys) == 2
    rows = Rows(memory(2), np.arange(2, dtype=np.int32))
    assert rig.tier.read(keys, 0, rows, deadline=0.0).result(10) == [Reason.TIMEOUT] * 2
    assert rig.tier.write(keys, 0, rows, namespace=bytes(16), deadline=soon()).result(10) == [Reason.NOT_ADMITTED] * 2
    rig.tier.close(10)
    assert rig.tier.read(keys, 0, rows, deadline=soon()).result(10) == [Reason.CLOSED] * 2


@pytest.mark.parametrize(("left_s", "rests"), [(0.01, False), (10.0, True)])
def test_a_read_that_had_no_time_is_not_the_peers_fault(rig: Rig, left_s: float, rests: bool) -> None:
    """Reads wait for one another; those whose time is nearly over when they begin say nothing of the node."""
    peer, lent = rig.peers.all()[0], Lent(1, "here", 0, PAGE, b"", b"")
    rig.transport.fault = lambda _: Reason.TIMEOUT
    for _ in range(3):
        assert rig.tier._move(peer, lent, Rows(memory(1), np.zeros(0, np.int32)), soon(left_s)) is Reason.TIMEOUT
    assert peer.reads.closed != rests


def test_a_pool_that_cannot_be_opened_ends_its_peer_tier() -> None:
    """Its clients ask for the pool again every few seconds, and each time has threads of its own."""
    overrides = {"compression.algorithm": "cachegen", "compression.calibration": "/there/is/none"}
    config = load_config(environ={}, overrides=overrides)
    tier = PeerTier(Peers(KEYPAIR), Here(), "pool", PAGE, Limits())
    with pytest.raises(CairnError, match="/there/is/none"):
        open_local(config, GEOMETRY, CANONICAL, Metrics(), CostModel(), None, tier)
    assert tier._closed
