"""What a recording holds, in figures."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cairn.fleet.base import Cleared, Event, Removed, Source, Stored
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.recording import Player, Recording


class _Counts:
    """A sink that counts: blocks by what happened to them and tier, clears, drops."""

    def __init__(self) -> None:
        self.blocks: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.drops = 0

    def apply(self, source: Source, events: Sequence[Event]) -> None:
        for event in events:
            self.events[type(event).__name__.lower()] += 1
            if isinstance(event, Stored | Removed):
                tier = "every" if event.tier is None else event.tier.name.lower()
                self.blocks[f"{type(event).__name__.lower()}_{tier}"] += len(event.hashes)
            else:
                assert isinstance(event, Cleared)

    def drop(self, source: Source) -> None:
        self.drops += 1


def summarize(recording: Recording) -> dict[str, Any]:
    """Figures of a recording: messages and batches' sequences by source, events and blocks by kind and tier, what could
    not be understood by reason, seconds, bytes. breaks: where a source's sequence does not go on, so that a player
    drops it. Raises StorageError.
    """
    counts, metrics = _Counts(), FleetMetrics()
    player, sources = Player(counts, metrics), dict[str, dict[str, int]]()
    times, size = list[float](), 0
    for message in recording:
        player.play([message])
        times.append(message.time)
        size += len(message.payload)
        name = f"{message.source.instance or '-'}/{message.source.rank}"
        source = sources.setdefault(name, {"messages": 0, "first": message.sequence, "last": 0})
        source["messages"] += 1
        source["last"] = message.sequence
    return {
        "messages": len(times),
        "seconds": times[-1] - times[0] if times else 0.0,
        "payload_bytes": size,
        "events": dict(counts.events),
        "blocks": dict(counts.blocks),
        "breaks": counts.drops,
        "skipped_events": metrics.fleet_skipped_events.figures(),
        "skipped_batches": metrics.fleet_skipped_batches.figures(),
        "torn": recording.torn,
        "sources": sources,
    }
