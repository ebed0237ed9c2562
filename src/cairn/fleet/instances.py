"""Whom to follow, within which bounds, and how it stands: values that a static list or a registry deals in."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec

from cairn.errors import InputError
from cairn.fleet.base import Source
from cairn.fleet.recording import Message


class Instance(NamedTuple):
    """A publisher to follow: one data-parallel rank of an instance; further ranks are further entries of that name.

    endpoint: where it publishes. replay: where its ROUTER is; None: gaps cannot be filled. bind: the publisher
    connects, so we must bind. vLLM's publisher binds only where its endpoint has a `*` or `::`, or is ipc or inproc;
    given `tcp://127.0.0.1:5557` it connects. rank: where batches do not tell theirs. topic: a prefix. model: what it
    serves; "": not told. Blocks do not say whose model they are of. copies: a block told again behind a parent is a
    second one, and is removed twice, as vLLM's are (`cairn.fleet.Stored`); False: the engine only repeats itself.
    """

    name: str
    endpoint: str
    replay: str | None = None
    bind: bool = False
    rank: int = 0
    topic: str = ""
    model: str = ""
    copies: bool = True


_FORM = "NAME=ENDPOINT[,replay=ENDPOINT][,bind][,rank=N][,topic=TEXT][,model=NAME][,copies=no]"
_OPTIONS = frozenset({"replay", "bind", "rank", "topic", "model", "copies"})


def parse_instance(text: str) -> Instance:
    """An instance as command line and configuration write it: `NAME=ENDPOINT[,replay=ENDPOINT][,bind][,rank=N]
    [,topic=TEXT][,model=NAME][,copies=no]`. Raises InputError.
    """
    name, _, rest = text.partition("=")
    endpoint, *options = rest.split(",")
    given = dict(option.partition("=")[::2] for option in options)
    rank, bind, copies = given.get("rank", "0"), given.get("bind", "true"), given.get("copies", "yes")
    usable = name.strip() and "://" in endpoint and len(given) == len(options) and given.keys() <= _OPTIONS
    usable = usable and "://" in (given.get("replay") or "://")  # or it would fail at the first connection, for ever
    usable = usable and bind in ("", "true") and copies in ("yes", "no") and rank.isascii() and rank.isdigit()
    usable = usable and len(rank) < 6  # more is no rank, and at some length no number for `int`
    if not usable:
        raise InputError(f"instance {text!r}: must be {_FORM}, as in a=tcp://10.0.0.1:5557,replay=tcp://10.0.0.1:5558")
    replay, topic, model = given.get("replay") or None, given.get("topic", ""), given.get("model", "")
    return Instance(name.strip(), endpoint, replay, "bind" in given, int(rank), topic, model, copies == "yes")


class Followed(Protocol):
    """A set of publishers that are followed; a registry, as of a cluster, adds and removes them while it runs."""

    async def add(self, instance: Instance) -> None:
        """Begins to follow a publisher. Raises InputError if it is followed already or cannot be."""

    async def remove(self, name: str) -> None:
        """Stops following all ranks of an instance and forgets what they hold. An unknown name is no error."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of a feed. Times in seconds, sizes in messages.

    queue: live messages that wait; beyond it the publisher drops, which is a gap. replay_s: a replay to its end.
    quiet_s: a pause within it. check_s: of silence, until the replay is asked whether something was missed. lost_s:
    without a connection, until the source is dropped.
    """

    queue: int = 10_000
    replay_s: float = 20.0
    quiet_s: float = 3.0
    check_s: float = 5.0
    lost_s: float = 30.0


class State(NamedTuple):
    """Where a feed stands. next: the sequence expected; None: nothing taken in. seen: when the last came, seconds since
    the epoch; 0.0: never.
    """

    instance: Instance
    source: Source | None
    connected: bool
    next: int | None
    seen: float


Tap = Callable[[Message], None]
