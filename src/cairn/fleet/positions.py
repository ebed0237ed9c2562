"""How far a publisher's stream has been taken in, as a value that outlives the process; and who takes it up again."""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Final, NamedTuple, Protocol

import msgspec

from cairn.fleet.base import Sink, Source
from cairn.fleet.metrics import WarmStarted

_Text = Annotated[str, msgspec.Meta(max_length=1 << 16)]
_Group = Annotated[int, msgspec.Meta(ge=0, le=255)]

#: What tells a feed from others: an instance's name, and where it publishes.
Key = tuple[str, str]


class Position(msgspec.Struct, frozen=True, array_like=True):
    """name, endpoint: of the instance. next: the sequence expected. digest: of the last batch's payload, 32 bytes: the
    same process still publishes only if its replay has a batch of that digest at next - 1. full, main: what the decoder
    has learnt of the source's KV groups. Names, keys and tiers of blocks are the index's, namespaces are in the keys.
    """

    name: _Text
    endpoint: _Text
    next: Annotated[int, msgspec.Meta(ge=1)]
    digest: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    full: Annotated[dict[_Group, bool], msgspec.Meta(max_length=256)]
    main: _Group | None

    @property
    def key(self) -> Key:
        return self.name, self.endpoint


def payload_digest(payload: bytes) -> bytes:
    """32 bytes that nobody can find a second payload to."""
    return hashlib.blake2b(payload, digest_size=32, person=b"cairn/fleet").digest()


class ShowingSink(Sink, Protocol):
    """A sink that holds sources back until they are proved (`FleetIndex`)."""

    def show(self, source: Source) -> None:
        """What is held of the source counts from now on."""


class Stand(NamedTuple):
    """A source that was held back, and how far it had been taken in."""

    source: Source
    position: Position


class WarmStart:
    """What a snapshot brought: sources that a sink holds back until their publishers prove that they are the same. For
    one event loop.

    outcome: how the reading went. sources, worker_blocks: taken in.
    """

    def __init__(
        self,
        sink: ShowingSink,
        outcome: WarmStarted,
        stands: Mapping[Source, Position],
        worker_blocks: int = 0,
    ) -> None:
        self.sink: Final = sink
        self.outcome: Final = outcome
        self.sources: Final = len(stands)
        self.worker_blocks: Final = worker_blocks
        self._stands = dict[Key, Stand]()
        for source, position in stands.items():
            # Two ranks in turn at one place, of which copies are left: it has one stream, so one of them is gone.
            if position.key in self._stands:
                sink.drop(self._stands[position.key].source)
            self._stands[position.key] = Stand(source, position)

    @property
    def stands(self) -> dict[Source, Position]:
        """What nobody has taken up yet."""
        return {stand.source: stand.position for stand in self._stands.values()}

    def take(self, key: Key) -> Stand | None:
        """Where this feed stood; once."""
        return self._stands.pop(key, None)

    def forget(self) -> int:
        """Makes the sink forget all that nobody has taken up; returns how many sources that were."""
        left, self._stands = self._stands, {}
        for stand in left.values():
            self.sink.drop(stand.source)
        return len(left)
