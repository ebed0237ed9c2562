"""The registry: a small key-value store that a cluster agrees on, with revisions, leases and watches.

The contract is etcd v3's (https://etcd.io/docs/v3.4/learning/api/), cut down to what Cairn uses. Every change of the
store has a revision, one more than the change before; all changes of one transaction share one. Keys are text, values
bytes. Two implementations: `cairn.cluster.memory`, which lives in one process, and `cairn.cluster.etcd`.

Every call has a deadline, past which it raises ClusterError. What waits for as long as it is let (a watch) may be
cancelled at any time and goes on where it was. A registry belongs to one event loop.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Final, NamedTuple, Self

from cairn.cluster.metrics import ClusterMetrics
from cairn.errors import InputError

#: Bounds of a key and of a value in bytes, and of a transaction in checks and in operations (etcd's own).
MAX_KEY: Final = 1024
MAX_VALUE: Final = 256 << 10
MAX_OPERATIONS: Final = 128

#: Keys that one listing may hold; a registry is no place for data.
MAX_ENTRIES: Final = 1 << 17


class Entry(NamedTuple):
    """A key as it stands. created, modified: revisions. version: 1 at its creation, one more a put. lease: 0: none."""

    key: str
    value: bytes
    created: int
    modified: int
    version: int
    lease: int


class Listing(NamedTuple):
    """The keys under a prefix, in their order, at a revision."""

    entries: tuple[Entry, ...]
    revision: int


class Change(NamedTuple):
    """A key was put, or deleted (entry None), at `revision`."""

    key: str
    entry: Entry | None
    revision: int


class Check(NamedTuple):
    """What must hold of a key for a transaction to be applied: equality with exactly one of these."""

    key: str
    created: int | None = None
    modified: int | None = None
    value: bytes | None = None

    @classmethod
    def absent(cls, key: str) -> Self:
        """The key is not there."""
        return cls(key, created=0)


class Put(NamedTuple):
    """Sets a key; it hangs from `lease` (0: from none) from now on."""

    key: str
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    """Deletes a key; none there is no error."""

    key: str


class Outcome(NamedTuple):
    """applied: whether all checks held. revision: of the store then, so of the changes. found: if it was not applied,
    what stands under the key of each check.
    """

    applied: bool
    revision: int
    found: tuple[Entry | None, ...] = ()


class Grant(NamedTuple):
    """A lease. ttl_s: seconds it lives without `keep_alive`; may be longer than was asked for."""

    id: int
    ttl_s: float


class Watch(ABC):
    """Changes under a prefix, each once and in the order of revisions: `async for changes in watch`.

    Changes of one revision come together. Where the history does not reach back far enough (compaction, a store that
    was lost and begun anew), the difference comes instead: a deletion of each key that is gone, a put of each that is
    new or another. Intermediate states are lost then, states are not. One consumer at a time; waiting for the next may
    be cancelled and loses nothing. Ends when it or the registry is closed. Raises ClusterError where the registry
    refuses (no permission); a registry that does not answer is waited for.
    """

    def __aiter__(self) -> Self:
        return self

    @abstractmethod
    async def __anext__(self) -> tuple[Change, ...]:
        """The next changes, at least one."""

    @property
    @abstractmethod
    def connected(self) -> bool:
        """Whether changes would come now."""

    @abstractmethod
    async def close(self) -> None:
        """Ends it. Repeatable."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()


class Registry(ABC):
    """The store. Raises ClusterError past the deadline or where it is refused, InputError beyond a bound, ClosedError
    after `close`.
    """

    metrics: ClusterMetrics

    @abstractmethod
    async def get(self, key: str) -> Entry | None:
        """What stands under a key now: no older than any answer given before the call, to whomever."""

    @abstractmethod
    async def range(self, prefix: str) -> Listing:
        """Every key that begins with `prefix`, of one revision, as current as `get`'s."""

    @abstractmethod
    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Sets a key; returns the revision. Over a broken connection it is repeated, so it may be applied twice.

        Raises LeaseLostError if the lease is gone.
        """

    @abstractmethod
    async def delete(self, key: str) -> bool:
        """Deletes a key; whether it was there. Repeated like `put`, and False then if the first one did it."""

    @abstractmethod
    async def transact(self, checks: Sequence[Check], operations: Sequence[Put | Delete]) -> Outcome:
        """Applies all operations at once if all checks hold, and otherwise none. A key may stand in one operation only.

        Raises LeaseLostError if a put's lease is gone, and UnclearError if the connection broke in between.
        """

    @abstractmethod
    async def grant(self, ttl_s: float) -> Grant:
        """A new lease; all keys that hang from it are deleted, at one revision, when it expires or is revoked."""

    @abstractmethod
    async def keep_alive(self, lease: int) -> float:
        """Begins the lease's time anew; returns its seconds. Raises LeaseLostError if it is gone."""

    @abstractmethod
    async def revoke(self, lease: int) -> None:
        """Ends a lease. One that is gone is no error."""

    @abstractmethod
    def watch(self, prefix: str, since: Listing) -> Watch:
        """What changes under `prefix` after `since`, a listing of the same prefix.

        Of a listing without entries only the revision counts; but then the difference lacks deletions that the watch
        has not seen the puts of.
        """

    @abstractmethod
    async def close(self) -> None:
        """Ends all calls and watches. Leases go on until they expire. Repeatable."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()


def check_key(key: str) -> None:
    """Raises InputError where a key breaks the bounds."""
    if not 0 < len(encode_key(key)) <= MAX_KEY:
        raise InputError(f"{key[:64]!r}: a key must have 1 to {MAX_KEY} bytes")


def check_put(key: str, value: bytes) -> None:
    """Raises InputError where a key or a value breaks the bounds."""
    check_key(key)
    if len(value) > MAX_VALUE:
        raise InputError(f"{key}: a value of {len(value)} bytes; at most {MAX_VALUE} fit")


def check_transaction(checks: Sequence[Check], operations: Sequence[Put | Delete]) -> None:
    """Raises InputError where a transaction breaks the bounds or contradicts itself."""
    if max(len(checks), len(operations)) > MAX_OPERATIONS:
        raise InputError(f"{len(checks)} checks and {len(operations)} operations; at most {MAX_OPERATIONS} of each")
    for check in checks:
        check_key(check.key)
        if sum(wanted is not None for wanted in check[1:]) != 1:
            raise InputError(f"{check.key}: a check must name one of created, modified and value")
    for operation in operations:
        if isinstance(operation, Put):
            check_put(operation.key, operation.value)
        else:
            check_key(operation.key)
    if len({operation.key for operation in operations}) < len(operations):
        raise InputError("a transaction must not change a key twice; leave out the first operation on it")


def check_ttl(ttl_s: float) -> None:
    """Raises InputError for a lease's seconds that are none."""
    if not 0 < ttl_s <= 1e6:
        raise InputError(f"{ttl_s}: a lease must last between 0 and 1e6 seconds")


def encode_key(key: str) -> bytes:
    """A key as bytes; those of others that are not UTF-8 come back as they were."""
    return key.encode("utf-8", "surrogateescape")


def decode_key(key: bytes) -> str:
    """The inverse of `encode_key`."""
    return key.decode("utf-8", "surrogateescape")
