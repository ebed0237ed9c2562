"""What lies between the wire and the index: events as values, and the sink that takes them in."""

import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt


class Tier(enum.IntEnum):
    """Where an instance holds a block, nearest first."""

    VRAM = 0
    CPU = 1
    DISK = 2
    REMOTE = 3


class Source(NamedTuple):
    """Who tells: an instance by its name, and the data-parallel rank within it. Each has a cache of its own."""

    instance: str
    rank: int


class Stored(msgspec.Struct, frozen=True):
    """Consecutive blocks of one prompt that are now held in `tier`.

    hashes: the engine's own names of the blocks, meaningful for this source only. parent: the name of the block before
    the first; None: the first one begins a prompt. tokens: all blocks' token ids, len(hashes) * block_tokens of them
    (a list, or a view of uint32 memory that numpy takes without a copy); empty for a tokenless event, which only
    says that blocks told before are in this tier too (block_tokens may be 0 then). namespace: 16 bytes over what
    separates whole prompts (LoRA, salt), b"" for none (`cairn.fleet.separation.namespace_digest`). A block with a
    parent inherits the parent's: vLLM names the salt with a prompt's first block only. extra: by block, 16 bytes over
    content beyond the tokens (pictures, prompt embeddings) or None; or empty: None for each. copies: where the event
    has a parent, those of its blocks that stand in VRAM already stand there once more, and are removed once more
    (vLLM does not merge equal blocks, and repeats from a prompt's start on what it reuses); False: only told again.
    """

    hashes: tuple[bytes | int, ...]
    parent: bytes | int | None
    tokens: Sequence[int]
    block_tokens: int
    tier: Tier
    namespace: bytes
    extra: tuple[bytes | None, ...]
    copies: bool = True


class Removed(msgspec.Struct, frozen=True):
    """Blocks that are no longer held in `tier` (None: in none). namespace_group: the KV group, where it is not the one
    that this source's `Stored` come from; None: it is.
    """

    hashes: tuple[bytes | int, ...]
    tier: Tier | None
    namespace_group: int | None


class Cleared(msgspec.Struct, frozen=True):
    """The source holds nothing any more, in any tier."""


class StoredMany(NamedTuple):
    """Several `Stored` in a row, of one tier and block size, without namespaces and extra content, as arrays.

    hashes [blocks]: the engine's names, the last 64 bits of each. told [events, 3]: the parent's name, whether the
    event begins a prompt instead (1 or 0), and which block comes behind its last. tokens [blocks, block_tokens].
    copies: see `Stored`.
    """

    hashes: npt.NDArray[np.uint64]
    told: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.uint32]
    tier: Tier
    copies: bool = True

    def each(self) -> Iterator[Stored]:
        """The events one by one."""
        first, size = 0, self.tokens.shape[1]
        for parent, begins, stop in self.told.tolist():
            hashes = tuple(self.hashes[first:stop].tolist())
            tokens = self.tokens[first:stop].reshape(-1).data
            yield Stored(hashes, None if begins else parent, tokens, size, self.tier, b"", (), self.copies)
            first = stop

    def behind(self, events: int) -> "StoredMany":
        """Without the first `events`, of which there must be more."""
        blocks = self.told[events - 1, 2] if events else np.uint64(0)
        told = self.told[events:] - np.array([0, 0, blocks], np.uint64)
        return self._replace(hashes=self.hashes[int(blocks) :], told=told, tokens=self.tokens[int(blocks) :])


Event = Stored | Removed | Cleared


def singly(events: "Iterable[Event | StoredMany]") -> Iterator[Event]:
    """Each event by itself."""
    for event in events:
        if isinstance(event, StoredMany):
            yield from event.each()
        else:
            yield event


class Sink(Protocol):
    """Takes events in. Called by one thread at a time for one source; must not block for long, and not raise.

    One that has an attribute `takes_many = True` gets `StoredMany` as well, whose arrays stand until it returns, and
    consecutive `Removed` of one tier as one: a tenth of the work.
    """

    def apply(self, source: Source, events: Sequence[Event]) -> None:
        """The events of one batch, in their order."""

    def drop(self, source: Source) -> None:
        """Forgets everything of a source: it is gone, has restarted, or events of it were lost."""
