"""Objects in Valkey or Redis: one server, or a cluster; TLS and passwords by URL.

An object is a plain string value under its name. With a time to live every use renews it, so that what is used stays;
without one, give the server `maxmemory` and an `allkeys-lru` or `-lfu` policy.
"""

import binascii
import contextlib
import logging
import ssl
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, TypeVar

from cairn.observe.log import log_once
from cairn.observe.reasons import Reason
from cairn.tier.remote.base import Get, ObjectStore, Put
from cairn.tier.remote.resp import Command, Connection, ErrorReply, ProtocolError, Reply, Target
from cairn.transport.moving import sum_up

log = logging.getLogger(__name__)

Address = tuple[str, int]
Answer = TypeVar("Answer")

_SLOTS: Final = 16384
#: Idle connections kept for each server.
_KEPT: Final = 32
#: What errors mean by their codes: no room for more; somebody else's list or hash under our name.
_MEANINGS: Final = {"OOM": Reason.NO_SPACE, "WRONGTYPE": Reason.FOREIGN}
#: What stands for a host in CLUSTER SLOTS that is to be reached as the one that was asked
#: (`cluster-preferred-endpoint-type`).
_NAMELESS: Final = (None, b"?")


class Login(NamedTuple):
    """How to greet a server. tls: None for plain TCP."""

    user: str = ""
    password: str = ""
    database: int = 0
    tls: ssl.SSLContext | None = None


class Servers:
    """Connections to one server, or to the masters of a cluster. Thread-safe; a connection serves one call at a time.

    cluster: `seed` is any of its servers; which one has a name is learnt from it, and anew when it has changed.
    """

    def __init__(self, seed: Address, login: Login, *, cluster: bool) -> None:
        self._seed = seed
        self._login = login
        self._cluster = cluster
        self._idle: defaultdict[Address, list[Connection]] = defaultdict(list)
        self._slots: list[Address] | None = None
        self._closed = False
        self._lock = threading.Lock()
        self.connects = 0

    def by_server(self, names: Sequence[bytes], deadline: float) -> dict[Address, list[int]]:
        """Which of the names, by their index, are whose. Raises OSError."""
        if not self._cluster:
            return {self._seed: list(range(len(names)))}
        slots = self._slots or self._learn(deadline)
        found: defaultdict[Address, list[int]] = defaultdict(list)
        for i, name in enumerate(names):
            found[slots[binascii.crc_hqx(name, 0) % _SLOTS]].append(i)
        return dict(found)

    def use(self, address: Address, deadline: float, work: Callable[[Connection], Answer]) -> Answer:
        """Lets `work` have a connection. A connection that it leaves by an exception is closed. Raises OSError.

        A connection that had been idle may have been closed by the server: then it is done once more with a new one.
        """
        with self._lock:
            connection = self._idle[address].pop() if self._idle[address] else None
        if connection is not None:
            try:
                return self._finish(address, connection, work)
            except (ConnectionError, ssl.SSLError):
                self._drop_idle(address)
        return self._finish(address, self._connect(address, deadline), work)

    def moved(self) -> None:
        """The cluster has changed: who has what is learnt anew."""
        self._slots = None

    def close(self) -> None:
        with self._lock:
            self._closed = True
        for address in list(self._idle):
            self._drop_idle(address)

    def _finish(self, address: Address, connection: Connection, work: Callable[[Connection], Answer]) -> Answer:
        try:
            answer = work(connection)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if not self._closed and len(self._idle[address]) < _KEPT:
                self._idle[address].append(connection)
                return answer
        connection.close()
        return answer

    def _drop_idle(self, address: Address) -> None:
        with self._lock:
            idle, self._idle[address] = self._idle[address], []
        for connection in idle:
            connection.close()

    def _connect(self, address: Address, deadline: float) -> Connection:
        login = self._login
        self.connects += 1
        connection = Connection(address, tls=login.tls, deadline=deadline)
        try:
            if login.password:
                words = [login.user.encode(), login.password.encode()] if login.user else [login.password.encode()]
                self._greet(connection, [b"AUTH", *words], deadline)
            if login.database:
                self._greet(connection, [b"SELECT", b"%d" % login.database], deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    def _greet(self, connection: Connection, command: Command, deadline: float) -> None:
        reply = connection.call(command, deadline=deadline)
        if isinstance(reply, ErrorReply):
            raise ProtocolError(str(reply))  # never with the password, which only the request has

    def _learn(self, deadline: float) -> list[Address]:
        reply = self.use(
            self._seed, deadline, lambda connection: connection.call([b"CLUSTER", b"SLOTS"], deadline=deadline)
        )
        slots: list[Address] = [self._seed] * _SLOTS
        if not isinstance(reply, list):
            raise ProtocolError(f"CLUSTER SLOTS: {reply!r}")
        for entry in reply:
            first, last, host, port = _range_of(entry)
            slots[first : last + 1] = [(host or self._seed[0], port)] * (last + 1 - first)
        self._slots = slots
        return slots


class ValkeyStore(ObjectStore):
    """ttl_s: objects that have not been used for so long go; None leaves that to the server."""

    object_bytes = 8 << 20
    probe_names = 4096

    def __init__(self, address: Address, *, login: Login, cluster: bool = False, ttl_s: float | None = None) -> None:
        self._servers = Servers(address, login, cluster=cluster)
        self._name = f"{address[0]}:{address[1]}"
        self._ttl_ms = b"%d" % max(1, round(ttl_s * 1000)) if ttl_s else None

    def exists(self, names: Sequence[bytes], *, deadline: float) -> list[bool] | Reason:
        commands: list[Command] = [
            [b"PEXPIRE", name, self._ttl_ms] if self._ttl_ms else [b"EXISTS", name] for name in names
        ]
        replies = self._all(names, commands, deadline)
        if isinstance(replies, Reason):
            return replies
        failed = next((self._failed(reply) for reply in replies if not isinstance(reply, int)), None)
        return failed or [reply == 1 for reply in replies]

    def put(self, puts: Sequence[Put], *, deadline: float) -> list[Reason | None]:
        # One after the other: pipelining values of a megabyte is slower.
        return [self._put(put, deadline) for put in puts]

    def get_into(self, gets: Sequence[Get], *, deadline: float) -> list[int | Reason]:
        names = [get.name for get in gets]
        found: list[int | Reason] = [Reason.IO_ERROR] * len(gets)
        try:
            for address, mine in self._servers.by_server(names, deadline).items():
                wanted = [gets[i] for i in mine]
                for i, size in zip(
                    mine, self._servers.use(address, deadline, _Reading(self, wanted, deadline)), strict=True
                ):
                    found[i] = size
        except OSError as error:
            return [self._broken(error)] * len(gets)
        return found

    def delete(self, names: Sequence[bytes], *, deadline: float) -> Reason | None:
        replies = self._all(names, [[b"UNLINK", name] for name in names], deadline)
        if isinstance(replies, Reason):
            return replies
        return next((self._failed(reply) for reply in replies if not isinstance(reply, int)), None)

    def health(self, *, deadline: float) -> Reason | None:
        replies = self._all([b""], [[b"PING"]], deadline)
        if isinstance(replies, Reason):
            return replies
        return None if replies == [b"PONG"] else self._failed(replies[0])

    def stats(self) -> Mapping[str, float]:
        return {"connects_total": self._servers.connects}

    def close(self) -> None:
        self._servers.close()

    def reading(self, get: Get) -> Command:
        """The command that answers a get."""
        if not get.whole:
            return [b"GETRANGE", get.name, b"%d" % get.offset, b"%d" % (get.offset + get.size - 1)]
        return [b"GETEX", get.name, b"PX", self._ttl_ms] if self._ttl_ms else [b"GET", get.name]

    def read(self, reply: int | ErrorReply | None, get: Get) -> int | Reason:
        """What a reply means."""
        if isinstance(reply, ErrorReply):
            return self._failed(reply)
        # A range of an object that is not there is an empty value.
        if reply is None or (reply == 0 and not get.whole):
            return Reason.ABSENT
        return reply

    # --- parts ---------------------------------------------------------------------------------------------------

    def _put(self, put: Put, deadline: float) -> Reason | None:
        expiry = (b"PX", self._ttl_ms) if self._ttl_ms else ()
        replies = self._all([put.name], [[b"SET", put.name, put.parts, *expiry]], deadline)
        if isinstance(replies, Reason):
            return replies
        return None if replies == [b"OK"] else self._failed(replies[0])

    def _all(self, names: Sequence[bytes], commands: Sequence[Command], deadline: float) -> list[Reply] | Reason:
        """The replies to commands, those for one server in one round trip."""
        found: list[Reply] = [None] * len(names)

        def ask(connection: Connection, mine: list[int]) -> None:
            connection.send([commands[i] for i in mine], deadline=deadline)
            for i in mine:
                found[i] = connection.reply(deadline=deadline)

        try:
            for address, mine in self._servers.by_server(names, deadline).items():
                self._servers.use(address, deadline, lambda connection, mine=mine: ask(connection, mine))  # type: ignore[misc]
        except OSError as error:
            return self._broken(error)
        return found

    def _failed(self, reply: Reply) -> Reason:
        """How an answer counts that is not what the command gives."""
        code = str(reply).split(" ")[0]
        if code in ("MOVED", "ASK", "CLUSTERDOWN", "READONLY"):
            self._servers.moved()
        log_once(log, f"{self._name} {code}", f"{self._name} answers {str(reply)[:200]!r}")
        return _MEANINGS.get(code, Reason.IO_ERROR)

    def _broken(self, error: OSError) -> Reason:
        self._servers.moved()
        if isinstance(error, TimeoutError):
            return Reason.TIMEOUT
        log_once(log, f"{self._name} {type(error).__name__}", f"{self._name}: {error}")
        return Reason.IO_ERROR


class _Reading:
    """Reads values on one connection, all in one round trip."""

    def __init__(self, store: ValkeyStore, gets: Sequence[Get], deadline: float) -> None:
        self._store = store
        self._gets = gets
        self._deadline = deadline

    def __call__(self, connection: Connection) -> list[int | Reason]:
        connection.send([self._store.reading(get) for get in self._gets], deadline=self._deadline)
        return [self._store.read(self._receive(connection, get), get) for get in self._gets]

    def _receive(self, connection: Connection, get: Get) -> int | ErrorReply | None:
        reply = connection.reply_into(Target(get.parts), deadline=self._deadline)
        if get.sums is not None and isinstance(reply, int):
            sum_up(get.parts, get.sums)
        return reply


def _range_of(entry: Reply) -> tuple[int, int, str, int]:
    """(first slot, last slot, host, port) of an entry of CLUSTER SLOTS; host "": that which was asked. Raises
    ProtocolError."""
    with contextlib.suppress(TypeError, ValueError, IndexError, AttributeError):
        assert isinstance(entry, list)
        first, last, master = entry[:3]
        if isinstance(first, int) and isinstance(last, int) and isinstance(master, list):
            host, port = master[:2]
            known = b"" if host in _NAMELESS else host
            if isinstance(known, bytes) and isinstance(port, int) and 0 <= first <= last < _SLOTS:
                return first, last, known.decode(), port
    raise ProtocolError(f"CLUSTER SLOTS: {entry!r}")
