"""Recordings of KV events: what a subscriber has taken in, in order, with the time: written, read, played, summed up.

A file begins with 8 bytes of magic and a JSON header (u32le length, then text) that describes the rest: one record a
message, `u32le number of parts, then for each part u32le length and bytes`. Parts are the time (f64le, seconds since
the epoch), the instance, the rank (u32le), and the message's own three: topic, sequence (u64be), payload. A file
without a header, of three parts a record, is read too.
"""

import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, NamedTuple, Self

from cairn.errors import StorageError
from cairn.fleet.base import Cleared, Event, Removed, Sink, Source, Stored
from cairn.fleet.events import Decoder
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.wire import MAX_PAYLOAD

MAGIC: Final = b"CAIRNKV1"
_RECORD: Final = (
    "u32le parts; a part: u32le length, bytes; parts: time f64le, instance, rank u32le, topic, sequence u64be, payload"
)
_U32: Final = struct.Struct("<I")
_F64: Final = struct.Struct("<d")


class Message(NamedTuple):
    """A message as it came. time: of its arrival, seconds since the epoch (0.0 where the file does not tell)."""

    time: float
    source: Source
    topic: bytes
    sequence: int
    payload: bytes


class Recorder:
    """Writes a recording. For one thread at a time; a process that is killed loses at most the last records."""

    def __init__(self, path: Path) -> None:
        """Makes the file. Raises StorageError if it is there already or cannot be made."""
        try:
            self._file: BinaryIO = path.open("xb")
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}; name a file that can be made and is not there yet") from None
        header = {"format": "cairn kv events", "version": 1, "record": _RECORD, "began": _now()}
        text = json.dumps(header).encode()
        self._file.write(MAGIC + _U32.pack(len(text)) + text)
        self.messages = 0

    def write(self, message: Message) -> None:
        source = message.source
        parts = (
            _F64.pack(message.time),
            source.instance.encode(),
            _U32.pack(source.rank),
            message.topic,
            message.sequence.to_bytes(8, "big"),
            message.payload,
        )
        self._file.write(_U32.pack(len(parts)) + b"".join(_U32.pack(len(part)) + part for part in parts))
        self.messages += 1

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Recording:
    """Reads a recording: iterate over it for its messages. Stops where a killed recorder's last record is torn, and
    has set `torn` then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.torn = False

    def __iter__(self) -> Iterator[Message]:
        """Raises StorageError if the file cannot be read or is no recording."""
        try:
            with self.path.open("rb") as file:
                if file.read(len(MAGIC)) == MAGIC:
                    file.seek(_length(file.read(4)), 1)
                else:
                    file.seek(0)
                while parts := self._record(file):
                    yield self._message(parts)
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror or error}") from None

    def _record(self, file: BinaryIO) -> list[bytes]:
        """The parts of the next record; none at the end."""
        head = file.read(4)
        if not head:
            return []
        parts = []
        for _ in range(min(_length(head), 7)):
            size = file.read(4)
            part = file.read(_length(size)) if _length(size) <= MAX_PAYLOAD else b""
            if len(size) < 4 or len(part) < _length(size):
                self.torn = True
                return []
            parts.append(part)
        return parts

    def _message(self, parts: list[bytes]) -> Message:
        if len(parts) == 3:
            parts = [_F64.pack(0.0), b"", _U32.pack(0), *parts]
        if len(parts) != 6 or [len(parts[i]) for i in (0, 2, 4)] != [8, 4, 8]:
            raise StorageError(f"{self.path}: not a recording of KV events")
        time, instance, rank, topic, sequence, payload = parts
        source = Source(instance.decode(errors="replace"), _length(rank))
        return Message(_F64.unpack(time)[0], source, topic, int.from_bytes(sequence, "big"), payload)


class Player:
    """Plays messages to a sink, as a subscriber would have: a sequence that does not go on drops the source first."""

    def __init__(self, sink: Sink, metrics: FleetMetrics | None = None) -> None:
        self._sink = sink
        self._metrics = metrics or FleetMetrics()
        self._streams: dict[Source, tuple[Decoder, int]] = {}

    def play(self, messages: Iterable[Message]) -> None:
        for message in messages:
            source = message.source
            decoder, expected = self._streams.get(source, (None, 0))
            if decoder is not None and message.sequence != expected:
                self._sink.drop(source)
                decoder = None
            decoder = decoder or Decoder(self._metrics, many=getattr(self._sink, "takes_many", False))
            self._streams[source] = decoder, message.sequence + 1
            batch = decoder.decode(message.payload)
            if batch is not None and batch.events:
                self._sink.apply(source, batch.events)


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


def _length(packed: bytes) -> int:
    """A u32le; 0 where it is cut off."""
    return int.from_bytes(packed, "little") if len(packed) == 4 else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
