"""What stands under the keys: JSON, readable with etcdctl, versioned, and bounded where it is taken in.

A reader takes fields that it does not know for nothing and fields that are missing for their defaults; what a reader of
today could misread gets a higher `v`, and is left out by it.
"""

from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from cairn.cluster.base import Entry
from cairn.cluster.metrics import Unread
from cairn.errors import InputError
from cairn.plan.role import Role

VERSION: Final = 1

#: What msgspec raises for bytes that are not of the form; DecodeError is a ValueError, as that of text in no UTF-8 is.
UNREADABLE: Final = (ValueError, RecursionError)

Name = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^/\x00-\x1f]+\Z")]
Text = Annotated[str, Meta(max_length=1024)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]  # as much as any reader of JSON takes, and a ledger has room for
Seconds = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class Events(msgspec.Struct, frozen=True, kw_only=True):
    """Where one data-parallel rank publishes its KV events over ZeroMQ, and where it replays them."""

    endpoint: Text
    replay: Text | None = None
    rank: Count = 0


class Versioned(msgspec.Struct, frozen=True, kw_only=True):
    """incarnation: names one life of a process; another one, another process, with another cache."""

    incarnation: Annotated[str, Meta(min_length=1, max_length=64)]
    v: int = VERSION


class Instance(Versioned, frozen=True, kw_only=True):
    """An engine. http: where its OpenAI API is, as http://10.0.0.1:8000. events: empty: it publishes none.

    block_tokens: of its KV blocks; 0: not known. version: the engine's own. started: seconds since the epoch.
    """

    name: Name
    http: Text
    role: Role = Role.DEFAULT
    model: Text = ""
    events: Annotated[tuple[Events, ...], Meta(max_length=1024)] = ()
    block_tokens: Count = 0
    capabilities: Annotated[tuple[Text, ...], Meta(max_length=64)] = ()
    version: Text = ""
    started: Seconds = 0.0


class Load(Versioned, frozen=True, kw_only=True):
    """How busy an instance is. time: of the report, seconds since the epoch. kv_usage: of the engine's own KV cache.

    ttft_s, tpot_s: means over the requests of the last while; None: there were none.
    """

    time: Seconds
    running: Count = 0
    waiting: Count = 0
    kv_usage: Share = 0.0
    ttft_s: Seconds | None = None
    tpot_s: Seconds | None = None


class TierState(msgspec.Struct, frozen=True, kw_only=True):
    """A tier in figures. Tokens and bytes moved: since the process began.

    capacity_bytes: 0: not known. shared: it is the host's node's, so other instances of the host report the same one,
    and what they have stored below DRAM together.
    """

    tier: Text
    capacity_bytes: Count = 0
    used_bytes: Count = 0
    blocks: Count = 0
    hit_tokens: Count = 0
    load_bytes: Count = 0
    store_bytes: Count = 0
    shared: bool = False


class CacheState(Versioned, frozen=True, kw_only=True):
    """What an instance's tiers hold and serve. time: of the report, seconds since the epoch.

    missed_tokens: by reason, since the process began.
    """

    time: Seconds
    tiers: Annotated[tuple[TierState, ...], Meta(max_length=16)] = ()
    missed_tokens: Annotated[dict[Text, Count], Meta(max_length=64)] = {}


class Drain(Versioned, frozen=True, kw_only=True):
    """Nothing new is to go to an instance. incarnation: the instance's."""


class Replica(Versioned, frozen=True, kw_only=True):
    """A replica of the service. http, rpc: where it listens."""

    name: Name
    http: Text
    rpc: Text = ""
    started: Seconds = 0.0


class HostNode(Versioned, frozen=True, kw_only=True):
    """A host's node. peers: where it answers other nodes, as tcp://10.0.0.1:8700."""

    name: Name
    peers: Text
    started: Seconds = 0.0


V = TypeVar("V", bound=Versioned)


def encode(value: Versioned) -> bytes:
    """The bytes of a value. Raises InputError for one that no reader would take."""
    data = msgspec.json.encode(value)
    try:
        msgspec.json.decode(data, type=type(value))
    except msgspec.ValidationError as error:
        raise InputError(f"{type(value).__name__} {getattr(value, 'name', '')}: {error}") from None
    return data


def decode(entry: Entry, kind: type[V]) -> V | Unread:
    """The value of an entry, or why it is none."""
    try:
        value = msgspec.json.decode(entry.value, type=kind)
    except UNREADABLE:  # a newer one may have fields of other types
        return Unread.NEWER if _version(entry.value) > VERSION else Unread.MALFORMED
    return value if value.v <= VERSION else Unread.NEWER


class _Version(msgspec.Struct):
    v: int = 0


def _version(data: bytes) -> int:
    try:
        return msgspec.json.decode(data, type=_Version).v
    except UNREADABLE:
        return 0
