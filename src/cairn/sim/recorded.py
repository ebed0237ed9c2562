"""KV events that were recorded (`cairn events record`), as the requests that must have caused them.

An engine tells of blocks when it stores them in its KV cache, so a request shows where its prompt was new: its chain is
that of the stored blocks back to their root. Blocks that hang from the end of a request's chain within 5 s go on with
it: several at once are its prompt's next chunk, one alone is its answer's next block; later ones are another turn. What
an engine finds in its cache as a whole is told by nobody and missing here, so hits are a lower bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cairn.errors import InputError, StorageError
from cairn.fleet.base import Event, Source, Stored, Tier, singly
from cairn.fleet.recording import Player, Recording
from cairn.sim.trace import Trace

Name = bytes | int

_IDLE_S = 5.0
"""People take longer to answer than engines to compute a block."""


@dataclass(slots=True)
class _Request:
    time: float
    chain: list[int]
    asked: int
    last: float


@dataclass(slots=True)
class _Told:
    """What a source's names stand for: a trace's id, and the name before."""

    blocks: dict[Name, tuple[int, Name | None]] = field(default_factory=dict)
    open: dict[Name, _Request] = field(default_factory=dict)  # by the name of its last block


class _Requests:
    """A sink that makes requests of events. now: the time of what comes. Ids are given to (id before, tokens), so equal
    prefixes have equal ids, whoever tells of them.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.made: list[_Request] = []
        self.block_tokens = 0
        self._sources: dict[Source, _Told] = {}
        self._ids: dict[tuple[int, bytes], int] = {}

    def apply(self, source: Source, events: Sequence[Event]) -> None:
        for event in singly(events):
            if isinstance(event, Stored) and event.tier is Tier.VRAM and len(event.tokens):
                self._stored(self._sources.setdefault(source, _Told()), event)

    def drop(self, source: Source) -> None:
        self._sources.pop(source, None)

    def _stored(self, told: _Told, event: Stored) -> None:
        if self.block_tokens not in (0, event.block_tokens):
            raise InputError(f"blocks of {self.block_tokens} and of {event.block_tokens} tokens: record one kind only")
        self.block_tokens = event.block_tokens
        if event.parent is not None and event.parent not in told.blocks:
            return  # it began before the recording
        request = told.open.pop(event.parent, None) if event.parent is not None else None
        if request is None or self.now - request.last > _IDLE_S:
            request = _Request(self.now, self._behind(told, event.parent), 0, self.now)
            self.made.append(request)
        request.last = self.now
        before = event.parent
        tokens = np.asarray(event.tokens, np.uint32).reshape(-1, event.block_tokens)
        for name, block in zip(event.hashes, tokens, strict=True):
            parent = request.chain[-1] if request.chain else -1
            request.chain.append(self._ids.setdefault((parent, block.tobytes()), len(self._ids)))
            told.blocks[name] = request.chain[-1], before
            before = name
        if len(event.hashes) > 1 or not request.asked:
            request.asked = len(request.chain)
        told.open[event.hashes[-1]] = request

    def _behind(self, told: _Told, name: Name | None) -> list[int]:
        """The ids up to a name, from the root."""
        chain = []
        while name is not None:
            block, name = told.blocks[name]
            chain.append(block)
        return chain[::-1]


def read_recording(path: Path) -> Trace:
    """Raises InputError for a file that is no recording, or that tells of no block in VRAM from its root on."""
    sink = _Requests()
    player = Player(sink)
    try:
        for message in Recording(path):
            sink.now = message.time
            player.play([message])
    except StorageError as error:
        raise InputError(str(error)) from None
    if not sink.made:
        raise InputError(f"{path}: no blocks stored in VRAM; record an engine's KV events from its start on")
    size = sink.block_tokens
    # An answer is at least the token that ends it.
    lengths = [(one.asked * size + 1, max(1, (len(one.chain) - one.asked) * size)) for one in sink.made]
    asked = [one.asked for one in sink.made]
    return Trace.of([one.time for one in sink.made], [one.chain for one in sink.made], lengths, asked, size)
