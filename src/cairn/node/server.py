"""The node's loop: one thread that answers clients and never waits, neither for a disk nor for a client."""

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, NamedTuple

from cairn.codec.choice import refuse_opaque
from cairn.config import Config
from cairn.errors import CairnError
from cairn.node import wire
from cairn.node.address import Address
from cairn.node.base import OpenStore
from cairn.node.bell import Bell
from cairn.node.gate import Entrance, Gate
from cairn.node.pools import VRAM, Pool, Pools, directory_of
from cairn.node.segments import HOME, Segments, sweep
from cairn.node.session import MAX_NUMBERS, Held, Session, Written
from cairn.node.vram import VramFound
from cairn.node.wire import keys_of, raw_of, rows_of
from cairn.node.zmtp import Caller, Router
from cairn.observe.log import log_once
from cairn.observe.metrics import Counted
from cairn.observe.reasons import Reason

log = logging.getLogger(__name__)

#: Sessions at a time: more engine processes than any host runs.
_MAX_SESSIONS: Final = 1024
#: Sessions that follow the tiers: each costs some 30 bytes a slot.
_MAX_FOLLOWERS: Final = 64
#: How often leases are looked at, and who follows the tiers is told of changes, seconds.
_TICK_S: Final = 0.05
_FLUSHERS: Final = 2


class PoolFigures(NamedTuple):
    """clients: sessions that use it. tiers: what each says of itself."""

    clients: int
    tiers: Mapping[str, Mapping[str, float]]


class Node:
    """Owns an address, segments of shared memory, and a pool for each geometry that clients have; gives all back in
    `close`. `run` serves until `stop`.

    A client's calls are answered at once, from the index in memory; what takes time (disk, remote store, opening a
    pool) is done by threads, whose results the loop sends on. Everything a client holds is its session's, which ends
    with its lease, with its process, or by itself; see `cairn.node.gate` for what its rows wait for then.

    Raises LockedError, StorageError or InputError where it cannot start.
    """

    def __init__(self, config: Config, address: str, open_store: OpenStore) -> None:
        self._config = config
        self._lease_s = config.node.lease_s
        self._address = Address(address)
        self._bell = Bell()
        self._segments: Segments | None = None
        try:
            sweep()
            self._segments = Segments()
            _rehearse(self._segments)
            self._router = Router(self._address.bind(), self._bell)
        except BaseException:
            self._give_back()
            raise
        self._pools = Pools(config, self._segments, open_store, self._bell.ring, self._retired)
        self._flusher = ThreadPoolExecutor(_FLUSHERS, "cairn-node-flush")
        self._sessions: dict[int, Session] = {}
        self._lingering: list[Session] = []
        self._numbers = secrets.randbits(40) << 20
        self._gates = 0
        self._news: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._counts = {"calls_total": 0, "malformed_total": 0, "expired_sessions_total": 0, "failed_calls_total": 0}
        self._own = Counted()
        self._own.watch("node", self.figures)
        self._handlers: dict[type, Callable[[Caller, Any], None]] = {
            wire.Hello: self._hello,
            wire.Match: self._match,
            wire.Take: self._take,
            wire.Reserve: self._reserve,
            wire.Commit: self._commit,
            wire.Ask: self._ask,
            wire.Stats: self._stats,
            wire.Flush: self._flush,
            wire.End: self._end,
            wire.Beat: self._beat,
            wire.Bye: self._bye,
            wire.Donate: self._donate,
            wire.Withdraw: self._withdraw,
            wire.TakeVram: self._take_vram,
            wire.ReserveVram: self._reserve_vram,
            wire.Used: self._used,
            wire.Follow: self._follow,
            wire.Silence: self._silence,
        }

    def run(self) -> None:
        """Serves until `stop`."""
        tick = time.monotonic() + _TICK_S
        while not self._stopping:
            looked = time.monotonic()
            for sender, message in self._router.messages(max(0.0, tick - looked)):
                self._answer(sender, message)
            while self._news:
                self._run_one(self._news.popleft())
            if time.monotonic() >= tick:
                # What had come by then was taken in: after a node was stopped, the beats of its clients are in it.
                self._look_at_leases(looked)
                self._tell_changes()
                tick = time.monotonic() + _TICK_S

    def stop(self) -> None:
        """Ends `run`, from any thread or a signal's handler."""
        self._stopping = True
        self._bell.ring()

    def close(self, timeout: float) -> None:
        """Tells the clients, flushes within `timeout`, and gives everything back. After `run` has ended."""
        for session in self._sessions.values():
            session.gate.close()
            session.pool.vram.retire(session.number)
            self._tell(session, wire.Gone(0))
        self._router.close()
        self._flusher.shutdown(wait=False, cancel_futures=True)
        self._pools.close(timeout)
        self._give_back()

    def pools(self) -> dict[str, PoolFigures]:
        """How each pool stands, by the name that its directory has. From any thread."""
        return {directory_of(*pool.kind): PoolFigures(pool.sessions, pool.metrics.tiers()) for pool in self._pools}

    def open_pools(self) -> list[Pool]:
        """Those there are now. From any thread."""
        return list(self._pools)

    def figures(self) -> dict[str, float]:
        """What the node says of itself."""
        sessions = [*self._sessions.values(), *self._lingering]
        return {
            **self._counts,
            "sessions": len(self._sessions),
            "lingering_sessions": len(self._lingering),
            "holds": sum(len(session.holds) for session in sessions),
            "writings": sum(len(session.writings) for session in sessions),
            "pools": len(list(self._pools)),
        }

    def counted(self) -> dict[str, Counted]:
        """What is counted in each pool, by the name that its directory has, and of the node itself under "". From any
        thread.
        """
        return {"": self._own, **{directory_of(*pool.kind): pool.metrics for pool in self._pools}}

    # --- what comes in -------------------------------------------------------------------------------------------

    def _answer(self, sender: Caller, message: memoryview) -> None:
        self._counts["calls_total"] += 1
        try:
            request = wire.decode_request(message)
            self._handlers[type(request)](sender, request)
        except wire.WireError as error:
            self._counts["malformed_total"] += 1
            log_once(log, "malformed", str(error))
            self._send(sender, wire.Refused(0, str(error)[:1000]))
        except Exception as error:  # noqa: BLE001 - a bug costs one call and not all clients: counted, logged
            self._counts["failed_calls_total"] += 1
            log_once(log, f"call {type(error).__name__}", f"a call failed: {error!r}")
            self._send(sender, wire.Refused(0, "the node failed at this; its log says how"))

    def _session(self, sender: Caller, request: Any) -> Session | None:
        session = self._sessions.get(request.session)
        if session is None:
            self._send(sender, wire.Gone(getattr(request, "call", 0)))
            return None
        session.seen = time.monotonic()
        return session

    def _hello(self, sender: Caller, request: wire.Hello) -> None:
        try:
            if len(self._sessions) + len(self._lingering) >= _MAX_SESSIONS:
                raise wire.WireError(f"more than {_MAX_SESSIONS} sessions at a time")
            refuse_opaque(self._config.compression, request.canonical)
            pool = self._pools.get(request.geometry, request.layout)
            if pool is None:
                self._send(sender, wire.Wait(request.call))
                return
            assert self._segments
            self._gates += 1
            name = self._segments.gate(self._gates)
            gate = Gate(HOME / name)
        except (CairnError, OSError) as error:
            self._send(sender, wire.Refused(request.call, " ".join(str(error).split())[:1000]))
            return
        self._numbers += 1
        session = self._sessions[self._numbers] = Session(self._numbers, pool, gate)
        tiers = [tier for tier in pool.metrics.tiers() if tier != VRAM]  # who shares VRAM asks for it himself
        self._send(
            sender,
            wire.Welcome(
                request.call,
                session.number,
                pool.arena,
                pool.slots,
                pool.stride,
                name,
                self._lease_s,
                tiers,
                pool.store.asks,
            ),
        )

    def _match(self, sender: Caller, request: wire.Match) -> None:
        session = self._session(sender, request)
        if session:
            keys = keys_of(request.keys)
            session.mention(keys)
            found = session.pool.vram.find(session.number, keys, request.own)
            if request.number and found.blocks == len(keys) > 0:
                parts = self._pinned(session, request.number, found)
                self._send(sender, wire.Matched(request.call, 0, [], found.blocks, found.held, parts))
                return
            held = session.pool.store.match(keys)
            self._send(sender, wire.Matched(request.call, held.dram, list(held.below), found.blocks, found.held))

    def _take(self, sender: Caller, request: wire.Take) -> None:
        session = self._session(sender, request)
        if session:
            session.check_new(request.number)
            if session.full:
                nothing = wire.Progress(request.call, request.number, 0, bytearray(), [], True, Reason.NO_SLOT)
                self._send(sender, nothing)
                return
            deadline = time.monotonic() + request.seconds
            keys, store = keys_of(request.keys), session.pool.store
            hold = store.hold(keys, deadline=deadline, use=False)
            held = session.holds[request.number] = Held(request.number, hold)
            if not hold.settled:
                hold.progress = partial(self._later, partial(self._progress, session, held))
            self._send(sender, held.news(request.call))
            store.used(keys)  # the client need not wait for the eviction policies

    def _reserve(self, sender: Caller, request: wire.Reserve) -> None:
        session = self._session(sender, request)
        if session:
            session.check_new(request.number)
            if session.full:
                self._send(sender, wire.Reserved(request.call, 0, bytearray()))
                return
            keys = keys_of(request.keys)
            session.mention(keys)
            writing = session.pool.store.write(keys, namespace=request.namespace)
            session.writings[request.number] = Written(writing)
            self._send(sender, wire.Reserved(request.call, writing.first, raw_of(writing.rows)))

    def _commit(self, sender: Caller, request: wire.Commit) -> None:
        session = self._session(sender, request)
        if session:
            written = session.writings.get(request.number)
            if written is None:
                raise wire.WireError(f"commit of {request.number}, which is no reservation")
            self._send(sender, wire.Committed(request.call, written.commit(request.count)))
            if written.done == len(written.writing.rows):
                session.end(request.number)  # as the client knows

    def _ask(self, sender: Caller, request: wire.Ask) -> None:
        session = self._session(sender, request)
        if session:
            session.check_new(request.number)
            deadline = time.monotonic() + request.seconds
            keys, worth_s = keys_of(request.keys), request.worth_seconds
            answer = None if session.full else session.pool.store.ask(keys, deadline=deadline, worth_s=worth_s)
            self._send(sender, wire.Answered(request.call, request.number, answer is None))
            if answer is not None:
                session.asked.add(request.number)
                answered = partial(self._answered, session, request.number)
                answer.add_done_callback(lambda _: self._later(answered))

    def _stats(self, sender: Caller, request: wire.Stats) -> None:
        session = self._session(sender, request)
        if session:
            tiers = {tier: dict(figures) for tier, figures in session.pool.metrics.tiers().items()}
            self._send(sender, wire.Figures(request.call, {**tiers, "node": self.figures()}))

    def _flush(self, sender: Caller, request: wire.Flush) -> None:
        session = self._session(sender, request)
        if session:
            session.check_new(request.number)
            if len(session.flushing) >= MAX_NUMBERS:
                raise wire.WireError(f"more than {MAX_NUMBERS} flushes at a time")
            session.flushing.add(request.number)
            flushed = self._flusher.submit(session.pool.store.flush, request.seconds)
            flushed.add_done_callback(
                lambda done: self._later(
                    partial(self._flushed, session, request.number, not done.cancelled() and done.result())
                )
            )
            self._send(sender, wire.Flushed(request.call, request.number, False))

    def _end(self, _: Caller, request: wire.End) -> None:
        session = self._sessions.get(request.session)
        if session:
            session.seen = time.monotonic()
            for number in request.numbers:
                session.end(number)

    def _follow(self, _: Caller, request: wire.Follow) -> None:
        session = self._sessions.get(request.session)
        if session:
            session.seen = time.monotonic()
            if not session.following and sum(bool(one.following) for one in self._sessions.values()) >= _MAX_FOLLOWERS:
                log_once(log, "followers", f"more than {_MAX_FOLLOWERS} engines follow the tiers: the rest is not told")
                return
            session.follow(request.number, request.tier)

    def _silence(self, _: Caller, request: wire.Silence) -> None:
        session = self._sessions.get(request.session)
        if session:
            session.seen = time.monotonic()
            for following in session.following.values():
                if following.number == request.number:
                    following.silence(rows_of(request.rows))

    def _beat(self, sender: Caller, request: wire.Beat) -> None:
        session = self._session(sender, request)
        if session:
            session.hears = sender
            self._send(sender, wire.Beaten())

    def _bye(self, sender: Caller, request: wire.Bye) -> None:
        session = self._sessions.pop(request.session, None)
        if session:
            self._over(session)
        self._send(sender, wire.Gone(0))

    # --- VRAM ----------------------------------------------------------------------------------------------------

    def _donate(self, sender: Caller, request: wire.Donate) -> None:
        session = self._session(sender, request)
        if session:
            assert self._segments
            self._gates += 1
            self._numbers += 1
            name = self._segments.life(self._gates)
            try:
                session.pool.vram.donate(session.number, self._numbers, request, HOME / name)
            except OSError as error:  # a client's VRAM is less than its session
                log_once(log, "donate", f"{HOME}: {error.strerror}; VRAM of {request.slots} blocks cannot be shared")
                self._send(sender, wire.Donated(request.call, 0, ""))
                return
            self._send(sender, wire.Donated(request.call, self._numbers, name))

    def _withdraw(self, sender: Caller, request: wire.Withdraw) -> None:
        session = self._session(sender, request)
        if session:
            session.withdrawn = session.pool.vram.retire(session.number) or session.withdrawn
            pins = session.withdrawn.readers if session.withdrawn else 0
            self._send(sender, wire.Withdrawn(request.call, pins))

    def _take_vram(self, sender: Caller, request: wire.TakeVram) -> None:
        session = self._session(sender, request)
        if session:
            found = session.pool.vram.find(session.number, keys_of(request.keys), request.own)
            parts = self._pinned(session, request.number, found)
            self._send(sender, wire.TakenVram(request.call, parts))

    def _used(self, _: Caller, request: wire.Used) -> None:
        session = self._sessions.get(request.session)
        if session:
            session.seen = time.monotonic()
            session.pool.vram.used(request.donation, keys_of(request.keys))

    @staticmethod
    def _pinned(session: Session, number: int, found: VramFound) -> list[wire.VramPart]:
        """Where leading blocks are in VRAM, pinned for a session under a number."""
        session.check_new(number)
        if session.full:
            return []
        hold = session.vram_holds[number] = found.pin()
        return hold.parts

    def _reserve_vram(self, sender: Caller, request: wire.ReserveVram) -> None:
        session = self._session(sender, request)
        if session:
            session.check_new(request.number)
            keys, vram = keys_of(request.keys), session.pool.vram
            reservation = None if session.full else vram.reserve(session.number, keys, request.own)
            if reservation is None:
                self._send(sender, wire.Reserved(request.call, 0, bytearray()))
                return
            session.writings[request.number] = Written(reservation)
            self._send(sender, wire.Reserved(request.call, reservation.first, raw_of(reservation.rows)))

    def _retired(self, donation: int) -> None:
        for session in self._sessions.values():
            self._tell(session, wire.Retired(donation))

    # --- what goes out by itself ---------------------------------------------------------------------------------

    def _progress(self, session: Session, held: Held) -> None:
        if not held.over and session.holds.get(held.number) is held:
            self._tell(session, held.news(0))

    def _answered(self, session: Session, number: int) -> None:
        if number in session.asked:
            session.asked.discard(number)
            self._tell(session, wire.Answered(0, number, True))

    def _flushed(self, session: Session, number: int, done: bool) -> None:
        session.flushing.discard(number)
        self._tell(session, wire.Flushed(0, number, done))

    def _tell_changes(self) -> None:
        for session in self._sessions.values():
            for following in session.following.values():
                changed = following.next()
                if changed:
                    self._tell(session, changed)

    def _tell(self, session: Session, message: wire.Reply) -> None:
        if session.hears is not None:
            self._send(session.hears, message)

    def _send(self, to: Caller, message: wire.Reply) -> None:
        to.send(wire.encode(message))

    # --- leases --------------------------------------------------------------------------------------------------

    def _look_at_leases(self, now: float) -> None:
        for session in list(self._sessions.values()):
            silent = now - session.seen
            # A client beats four times a lease: one that missed two beats is looked for.
            if silent > self._lease_s or (silent > self._lease_s / 2 and not session.gate.attended()):
                self._counts["expired_sessions_total"] += 1
                log.info("session %d has been silent for %.1f s: its lease is over", session.number, silent)
                del self._sessions[session.number]
                self._over(session)
        self._lingering = [session for session in self._lingering if not _given_back(session)]

    def _over(self, session: Session) -> None:
        session.pool.vram.retire(session.number)
        if not _given_back(session):
            self._lingering.append(session)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _run_one(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:  # noqa: BLE001 - as in _answer
            self._counts["failed_calls_total"] += 1
            log_once(log, f"news {type(error).__name__}", f"news could not be told: {error!r}")

    def _later(self, task: Callable[[], None]) -> None:
        """Has the loop do it; from any thread."""
        self._news.append(task)
        self._bell.ring()

    def _give_back(self) -> None:
        if self._segments:
            self._segments.close()
        self._address.release()


def _given_back(session: Session) -> bool:
    """Gives everything back as soon as nobody can touch it any more."""
    if not session.gate.close():
        return False
    session.give_back()
    return True


def _rehearse(segments: Segments) -> None:
    """Has the gate's kernels compiled."""
    gate = Gate(HOME / segments.gate(0))
    entrance = Entrance(gate.path)
    entrance.enter()
    entrance.leave()
    gate.close()
    gate.remove()
