"""What replicas of the index share in Valkey: a copy of each source, written by whoever holds the lease.

Keys, of a fleet of one name (in braces, so that a cluster keeps them together):

    {cairn:NAME}:lease        who may write, "replica:token"; expires
    {cairn:NAME}:token        counts leases up: who comes later has the larger token
    {cairn:NAME}:sources      hash: source's digest -> "data key|chunks"
    {cairn:NAME}:data:...     hash: number -> chunk of a snapshot of one source (`snapshot_format`)

Chunks go to a key of their own, which expires unless it is published; publishing is one step on the server, which first
looks whether the lease is still the writer's. So a writer that was stopped for too long can publish nothing, and nobody
reads half a copy.
"""

import hashlib
import secrets
import time
from typing import Any, Final
from urllib.parse import urlsplit

from cairn.errors import InputError, StorageError
from cairn.fleet.base import Source

CHUNK: Final = 1 << 20
_MOST_SOURCES: Final = 1 << 16
#: How long replaced copies stay for those who are reading them, and chunks that nobody publishes, milliseconds.
_GRACE_MS: Final = 60_000

_LEASE: Final = """
local held = redis.call('GET', KEYS[1])
if held and string.sub(held, 1, #ARGV[1]) == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return held
end
if held then return false end
local mine = ARGV[1] .. redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], mine, 'PX', ARGV[2])
return mine
"""

_PUT: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return 1
"""

_PUBLISH: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] or redis.call('HLEN', KEYS[2]) ~= tonumber(ARGV[4]) then return 0 end
local old = string.match(redis.call('HGET', KEYS[3], ARGV[2]) or '', '^(.*)|')
redis.call('HSET', KEYS[3], ARGV[2], KEYS[2] .. '|' .. ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('PEXPIRE', KEYS[3], ARGV[3])
if old then redis.call('PEXPIRE', old, ARGV[5]) end
return 1
"""


class FencedError(Exception):
    """The lease is another's."""


class SharedStore:
    """A connection to one fleet's copies. For one thread; every call returns within a few `timeout_s`.

    All calls raise StorageError where the server does not answer, or answers nonsense.
    """

    def __init__(self, url: str, fleet: str, *, timeout_s: float, lease_s: float, keep_s: float) -> None:
        """url: valkey://user:password@host:port/db, valkeys:// with TLS, or unix:///path. lease_s: for which a writer
        that is not heard of keeps others from writing. keep_s: for which copies are kept. Raises InputError.
        """
        try:
            import valkey
            from valkey.backoff import NoBackoff
            from valkey.retry import Retry
        except ModuleNotFoundError:
            raise InputError("replicas share through Valkey; install cairn-kv[valkey]") from None
        self.where = place_of(url)
        try:
            self._client = valkey.Valkey.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                decode_responses=False,
            )
        except ValueError:
            raise InputError(f"{self.where}: no URL of a Valkey; write valkey://user:password@host:port/0") from None
        self._failures = (valkey.exceptions.ValkeyError, OSError)
        self._prefix = f"{{cairn:{fleet}}}:"
        self._me = secrets.token_hex(8) + ":"
        self._lease_ms, self._keep_ms = int(1000 * lease_s), int(1000 * keep_s)
        self._mine = b""

    def lead(self) -> bool:
        """Takes the lease, or renews it; whether it is ours."""
        mine = self._run(_LEASE, ["lease", "token"], [self._me, self._lease_ms])
        self._mine = mine if isinstance(mine, bytes) else b""
        return bool(self._mine)

    def resign(self) -> None:
        """Others may write now."""
        if self._mine:
            self._run(
                "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end",
                ["lease"],
                [self._mine],
            )
            self._mine = b""

    def write(self, source: Source) -> "CopyWriter":
        """For a copy of this source, while the lease is ours."""
        return CopyWriter(self, source)

    def entries(self) -> list[tuple[bytes, int]]:
        """Copies: the keys of their data, and the numbers of chunks."""
        if int(self._call("HLEN", "sources")) > _MOST_SOURCES:
            raise StorageError(f"{self.where}: more than {_MOST_SOURCES} sources; empty the database")
        found: dict[bytes, bytes] = self._call("HGETALL", "sources")
        split = [entry.rpartition(b"|") for entry in found.values()]
        return [(key, int(chunks)) for key, _, chunks in split if chunks.isdigit() and len(chunks) < 8]

    def chunk(self, key: bytes, number: int) -> bytes:
        """A chunk of a copy; empty if it is not there, or cannot be one."""
        size = int(self._raw("HSTRLEN", key, number))
        if not 0 < size <= CHUNK:
            return b""
        return bytes(self._raw("HGET", key, number) or b"")

    def prune(self) -> None:
        """Strikes sources off the list whose copies have expired."""
        found: dict[bytes, bytes] = self._call("HGETALL", "sources")
        for source, entry in found.items():
            if not self._raw("EXISTS", entry.rpartition(b"|")[0]):
                self._call("HDEL", "sources", source)

    def close(self) -> None:
        self._client.close()  # type: ignore[no-untyped-call]

    def put(self, key: bytes, number: int, chunk: bytes) -> None:
        """Raises FencedError too."""
        arguments = [self._mine, self._lease_ms, number, chunk, _GRACE_MS]
        if not self._run(_PUT, ["lease"], arguments, key):
            raise FencedError

    def publish(self, source: bytes, key: bytes, chunks: int) -> None:
        """Raises FencedError too."""
        arguments = [self._mine, source, self._keep_ms, chunks, _GRACE_MS]
        if not self._run(_PUBLISH, ["lease", "sources"], arguments, key):
            raise FencedError

    def new_key(self, source: bytes) -> bytes:
        return f"{self._prefix}data:".encode() + source + f":{secrets.token_hex(8)}".encode()

    def _run(self, script: str, names: list[str], arguments: list[Any], data: bytes | None = None) -> Any:
        keys: list[Any] = [self._prefix + name for name in names]
        if data is not None:
            keys.insert(1, data)
        return self._raw("EVAL", script, len(keys), *keys, *arguments)

    def _call(self, command: str, name: str, *arguments: Any) -> Any:
        return self._raw(command, self._prefix + name, *arguments)

    def _raw(self, *command: Any) -> Any:
        try:
            return self._client.execute_command(*command)  # type: ignore[no-untyped-call]
        except self._failures as error:
            raise StorageError(f"{self.where}: {type(error).__name__}") from None


class CopyWriter:
    """Takes the bytes of one source's snapshot; `publish` makes them the source's copy."""

    def __init__(self, store: SharedStore, source: Source) -> None:
        self._store = store
        self._source = hashlib.blake2s(f"{source.rank}/{source.instance}".encode(), digest_size=16).hexdigest().encode()
        self._key = store.new_key(self._source)
        self._pending = bytearray()
        self._chunks = 0

    def write(self, data: bytes) -> None:
        """Raises StorageError, FencedError."""
        self._pending += data
        while len(self._pending) >= CHUNK:
            self._put(CHUNK)

    def publish(self) -> None:
        """Raises StorageError, FencedError."""
        if self._pending:
            self._put(len(self._pending))
        self._store.publish(self._source, self._key, self._chunks)

    def _put(self, size: int) -> None:
        self._store.put(self._key, self._chunks, bytes(self._pending[:size]))
        self._chunks += 1
        del self._pending[:size]


class CopyReader:
    """Gives the bytes of one source's snapshot. read: as a file's; fewer bytes than asked for where chunks are missing.

    Raises StorageError, also when `deadline` (of time.monotonic) is over.
    """

    def __init__(self, store: SharedStore, key: bytes, chunks: int, deadline: float) -> None:
        self._store, self._key, self._chunks, self._deadline = store, key, chunks, deadline
        self._next = 0
        self._buffer = bytearray()

    def read(self, count: int) -> bytes:
        while len(self._buffer) < count and self._next < self._chunks:
            if time.monotonic() > self._deadline:
                raise StorageError(f"{self._store.where}: not read in time")
            chunk = self._store.chunk(self._key, self._next)
            if not chunk:
                self._chunks = 0
            self._buffer += chunk
            self._next += 1
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found


def place_of(url: str) -> str:
    """A URL without user and password."""
    try:
        parts = urlsplit(url)
        if "@" in parts.path:  # a password with a slash
            return "the shared store"
        host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or ""
        return f"{parts.scheme}://{host}{parts.path}"
    except ValueError:
        return "the shared store"
