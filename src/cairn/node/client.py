"""A client's side of the protocol: one session at a time, made and kept in the background.

`NodeClient.link` is the session that stands now, or None; a call on it that the node does not answer in time ends it.
Nobody waits for a node that is gone: the background thread looks for it, and calls go on as soon as it is found.
"""

import itertools
import logging
import math
import select
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from typing import Final

from cairn.kv import CANONICAL, KVGeometry, Layout
from cairn.node import wire
from cairn.node.address import socket_path
from cairn.node.base import Home, Memory
from cairn.node.bell import Bell
from cairn.node.gate import Entrance, Passage
from cairn.node.segments import path_of
from cairn.node.zmtp import Dealer, ProtocolError
from cairn.observe.log import log_once
from cairn.tier.arena import Arena

log = logging.getLogger(__name__)

#: Between two looks for a node, seconds: while its pool is being opened, and while it is not there or has refused.
_SOON_S: Final = 0.02
_RETRY_S: Final = 0.25
_REFUSED_S: Final = 5.0

#: Replies that end a session, and those that come by themselves. (A union made at each call takes a microsecond.)
_OVER: Final = (wire.Gone, wire.Refused)
_NEWS: Final = (wire.Progress, wire.Answered, wire.Flushed, wire.Changed, wire.Retired)

#: What ends a connection, with its reason.
_BROKEN: Final = (wire.WireError, ProtocolError, OSError)

#: Told of what the node says about a number (None: the session is over, and nothing more will come). Called by the
#: client's thread, which it must not keep.
Told = Callable[[wire.Reply | None], None]


class Link:
    """One session: connection, arena, gate. Thread-safe but for `follow` and `dispose`, the client's thread's.

    memory: the arena, uint8 [slots, stride]; touched only inside of `passage`.
    """

    def __init__(self, client: "NodeClient", welcome: wire.Welcome, arena: Arena, calls: Dealer) -> None:
        """Raises StorageError or OSError where the gate is not to be had."""
        self.welcome = welcome
        self.arena = arena
        self.memory: Memory = arena.memory
        self.home = Home(welcome.arena, welcome.slots, welcome.stride, welcome.gate)
        self.alive = True
        self._entrance = Entrance(path_of(welcome.gate))
        self._client = client
        self._calls = calls
        self._lock = threading.Lock()
        self._waiting: dict[int, Told] = {}

    def passage(self) -> Passage:
        """A context in which rows that this session holds may be touched."""
        return Passage(self._entrance, self.memory)

    def expect(self, number: int, told: Told) -> None:
        """What comes about `number` is told from now on, until `forget`; at once, if the session is over."""
        self._waiting[number] = told
        if not self.alive and self._waiting.pop(number, _nobody) is told:
            told(None)

    def forget(self, number: int) -> None:
        self._waiting.pop(number, None)

    def call(self, request: wire.Request) -> wire.Reply | None:
        """The node's answer; None if there is none in time, and then the session is over."""
        timeout = self._client.timeout_s
        if not self.alive:
            return None
        if not self._lock.acquire(timeout=timeout):
            self._lost("calls before it are not answered")
            return None
        try:
            return self._answer(request) if self.alive else None
        except TimeoutError:
            self._lost(f"no answer within {timeout:g} s")
        except _BROKEN as error:
            self._lost(str(error))
        finally:
            self._lock.release()
        return None

    def _answer(self, request: wire.Request) -> wire.Reply | None:
        self._calls.send(wire.encode(request))
        while True:
            reply = wire.decode_reply(self._calls.recv())
            if isinstance(reply, _OVER):
                self._lost(reply.why if isinstance(reply, wire.Refused) else "it has ended the session")
                return None
            if getattr(reply, "call", 0) == getattr(request, "call", None):
                return reply

    def end(self, *numbers: int) -> None:
        """Gives back what has these numbers. Never waits for the node."""
        for number in numbers:
            self.forget(number)
        self.tell(wire.End(self.welcome.session, list(numbers)))

    def tell(self, message: wire.Request) -> None:
        """Says what is not answered. Never waits for the node."""
        if not self.alive:
            return
        if not self._lock.acquire(timeout=self._client.timeout_s):
            self._lost("calls before it are not answered")  # or the node would keep what was to be given back
            return
        try:
            if self.alive:
                self._calls.send(wire.encode(message))
        except OSError as error:
            self._lost(str(error))
        finally:
            self._lock.release()

    def told(self, reply: wire.Reply) -> None:
        """Something has come by itself."""
        if isinstance(reply, _NEWS):
            told = self._waiting.get(reply.number)
            if told:
                told(reply)

    def lose(self) -> None:
        """The session is over, whatever the node thinks of it."""
        self.alive = False
        while self._waiting:
            _, told = self._waiting.popitem()
            told(None)

    def dispose(self) -> None:
        """Hangs up. What is still read or written through the gate keeps arena and gate until it ends."""
        with self._lock:  # nobody keeps it for longer than a call's timeout
            self._calls.close()

    def _lost(self, why: str) -> None:
        if self.alive:
            self.alive = False
            self._client.lost(why)


class NodeClient:
    """Keeps a session at the node for the blocks of one geometry and layout, and finds another when it is over.

    `refusal`: why the node will not have this client; None while it might. on_link: told of every new session
    before others find it, so that what it says reaches the node first. canonical: whether codecs can read its rows'
    values.
    """

    def __init__(
        self,
        address: str,
        geometry: KVGeometry,
        layout: Layout = CANONICAL,
        *,
        timeout_s: float,
        on_link: Callable[[Link], None] | None = None,
        canonical: bool = True,
    ) -> None:
        """Raises InputError for what is no address. Waits for nothing."""
        self.address = address
        self.timeout_s = timeout_s
        self.link: Link | None = None
        self.refusal: str | None = None
        self.links = 0
        self.losses = 0
        self.path = socket_path(address)
        self._geometry = geometry
        self._layout = layout
        self._canonical = canonical
        self._on_link = on_link
        self._ids = itertools.count(1)
        self._arena: tuple[str, Arena] | None = None
        self._wake = Bell()
        self._closing = threading.Event()
        self._found = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cairn-node-client", daemon=True)
        self._thread.start()

    def number(self) -> int:
        """A number that nothing else has."""
        return next(self._ids)

    def wait(self, timeout: float) -> Link | None:
        """Waits for the first session, or for a refusal."""
        self._found.wait(timeout)
        return self.link

    def lost(self, why: str) -> None:
        """The session that stands is over. From any thread."""
        self.losses += 1
        log_once(log, f"lost {self.address}", f"node at {self.address}: {why}; going on without until it is back")
        self._wake.ring()

    def close(self) -> None:
        """Ends the session. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake.ring()
        self._thread.join()

    # --- the client's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        while not self._closing.is_set():
            pause = _RETRY_S
            with ExitStack() as stack:
                dealers = self._dealers(stack)
                if dealers:
                    link, pause = self._connect(*dealers)
                    if link:
                        self._serve(link, dealers[1])
            if not self._closing.is_set() and poller.poll(int(pause * 1000)):
                self._wake.heard()

    def _dealers(self, stack: ExitStack) -> tuple[Dealer, Dealer] | None:
        """Connections for calls and for what comes by itself, if a node listens."""
        try:
            calls, hears = (stack.enter_context(closing(Dealer(self.path, self.timeout_s))) for _ in range(2))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except _BROKEN as error:
            self._failed(error)
            return None
        return calls, hears

    def _serve(self, link: Link, hears: Dealer) -> None:
        """The life of a session."""
        if self._on_link:
            self._on_link(link)
        self.link = link
        self.links += 1
        self._found.set()
        self._follow(link, hears)
        self._part(link, hears)

    def _connect(self, calls: Dealer, hears: Dealer) -> tuple[Link | None, float]:
        """A session, or how long to wait before the next attempt."""
        try:
            hello = wire.Hello(self.number(), 0, self._geometry, self._layout, self._canonical)
            reply = _first(calls, hello)
            if isinstance(reply, wire.Wait):
                return None, _SOON_S
            if isinstance(reply, wire.Refused):
                return self._refused(reply.why)
            if not isinstance(reply, wire.Welcome):
                return None, _RETRY_S
            link = Link(self, reply, self._attach(reply), calls)
            link._entrance.enter()  # has its kernels compiled
            link._entrance.leave()
            if isinstance(_first(hears, wire.Beat(reply.session)), wire.Beaten):
                self.refusal = None
                return link, 0.0
        except wire.VersionError as error:
            return self._refused(str(error))
        except _BROKEN as error:
            self._failed(error)
        return None, _RETRY_S

    def _failed(self, error: Exception) -> None:
        log_once(log, f"connect {type(error).__name__} {self.address}", f"node at {self.address}: {error}")

    def _refused(self, why: str) -> tuple[None, float]:
        self.refusal = why
        log_once(log, f"refused {self.address}", f"node at {self.address}: {why}")
        self._found.set()
        return None, _REFUSED_S

    def _attach(self, welcome: wire.Welcome) -> Arena:
        """The arena, mapped once for all sessions at the same node. Raises StorageError."""
        if self._arena is None or self._arena[0] != welcome.arena:
            self._arena = None  # a dead node's goes with the last who reads from it
            self._arena = welcome.arena, Arena.attach(welcome.arena, welcome.slots, welcome.stride)
        return self._arena[1]

    def _follow(self, link: Link, hears: Dealer) -> None:
        """Beats, and tells what comes, until the session is over."""
        poller = select.poll()
        poller.register(hears, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        lease = link.welcome.lease_s
        beat, unanswered = time.monotonic() + lease / 4, 0.0
        self._hear(link, hears)  # what came with the first answer
        while link.alive and not self._closing.is_set():
            looked = time.monotonic()
            ready = dict(poller.poll(max(0, math.ceil((beat - looked) * 1000))))
            if self._wake.fileno() in ready:
                self._wake.heard()
            if hears.fileno() in ready:
                unanswered = 0.0
                self._hear(link, hears)
            # By when the socket was last looked at: this thread may not have run for longer than a lease.
            elif unanswered and looked - unanswered > lease:
                link._lost(f"no beat within {lease:g} s")
            if time.monotonic() >= beat:
                _send(hears, wire.Beat(link.welcome.session))
                unanswered = unanswered or time.monotonic()
                beat = time.monotonic() + lease / 4

    def _hear(self, link: Link, hears: Dealer) -> None:
        try:
            while True:
                reply = wire.decode_reply(hears.recv(wait=False))
                if isinstance(reply, wire.Gone):
                    link._lost("it has ended the session")
                    return
                link.told(reply)
        except BlockingIOError:
            return
        except _BROKEN as error:
            link._lost(str(error))

    def _part(self, link: Link, hears: Dealer) -> None:
        self.link = None
        link.alive = False
        _send(hears, wire.Bye(link.welcome.session))
        link.lose()
        link.dispose()
        # Whoever closes has given everything back when it returns, unless the node is gone.
        deadline = time.monotonic() + self.timeout_s
        while self._closing.is_set() and time.monotonic() < deadline:
            try:
                if isinstance(wire.decode_reply(hears.recv()), wire.Gone):
                    return
            except _BROKEN:
                return  # nothing of sense comes from there any more


def _nobody(_: wire.Reply | None) -> None: ...


def _send(dealer: Dealer, message: wire.Request) -> None:
    with suppress(OSError):  # what was not said in time is known by the lease
        dealer.send(wire.encode(message))


def _first(dealer: Dealer, request: wire.Request) -> wire.Reply | None:
    """The answer to the first request, or None if none comes in time. Raises one of _BROKEN."""
    try:
        dealer.send(wire.encode(request))
        return wire.decode_reply(dealer.recv())
    except TimeoutError:
        return None
