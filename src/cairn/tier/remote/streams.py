"""Compressed objects: all blocks one stream, by a codec that the frame names.

    offset    bytes
    0         4096     frame (`cairn.codec.frame`) of all blocks together: key of the last one, codec, lengths, checksum
    4096      size     the stream

What a name says of the content is less than it says of blocks as they are: whoever stores first decides on codec and
level. So objects go by the *family* of the codecs that may be in them. In the exact one every bit comes back, and no
process finds there what another has stored with loss; in the lossy one every level may be found. A stream says itself
how it is to be read, so within a family it does not matter what a reader would have stored.
"""

import time
from typing import Final

import numpy as np

from cairn.codec import Codec
from cairn.codec.base import SINK_TOKENS, Octets
from cairn.codec.frame import FrameHeader, Framer, checksum_of, parse
from cairn.codec.ladder import Ladder
from cairn.codec.raw import Raw
from cairn.codec.seal import HEADER_LIMIT
from cairn.kv import Keys
from cairn.observe.decisions import record
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.plan import Kind, LoadCost
from cairn.tier.base import Rows

#: An object with loss may be so many times larger than a store likes, before it is compressed: every lossy codec makes
#: about that of it or less, and takes the fewer bits the more tokens there are.
LOSSY_GROWTH: Final = 2
#: Raised when a codec is added, so that those who cannot read it do not find what it made.
_VERSION: Final = 1
_PAGE: Final = HEADER_LIMIT


class Streams:
    """Makes objects of blocks and blocks of objects, and learns from both what pays. Thread-safe."""

    def __init__(self, ladder: Ladder, metrics: Metrics, tier: str = "remote") -> None:
        self.family = f"{'lossy' if ladder.lossy else 'exact'} {_VERSION}"
        self.growth = LOSSY_GROWTH if ladder.lossy else 1
        self._ladder = ladder
        self._metrics = metrics
        self._tier = tier
        self._block_bytes = ladder.geometry.block_bytes
        self._loads, self._stores = LoadCost(), LoadCost()
        self._framers = {rung.codec.id: Framer(rung.codec) for rung in ladder.rungs}
        self._raw = Framer(Raw(ladder.geometry))

    def object_limit(self, blocks: int) -> int:
        """The most bytes that an object of so many blocks has: what does not get smaller is stored as it is."""
        return _PAGE + blocks * self._block_bytes

    def loaded(self, size: int, seconds: float) -> None:
        """Counts the load of an object of `size` stored bytes."""
        self._loads.observe(size, seconds)

    def stored(self, size: int, seconds: float) -> None:
        """Counts the store of one; what it takes stands for loads while none has been seen."""
        self._stores.observe(size, seconds)

    def encode(self, keys: Keys, namespace: bytes, rows: Rows, *, begins: bool) -> list[memoryview]:
        """The bytes of an object of these blocks, keys [n, 2]; begins: whether the first one begins a sequence."""
        blocks = _neighbours(rows)
        if blocks is None:
            blocks = _gathered(rows)
        size = len(blocks) * self._block_bytes
        known = next((cost for cost in (self._loads, self._stores) if cost.ready), None)
        rung, why = self._ladder.choose(size, known.seconds if known else None)
        record(self._metrics, Kind.CODEC, rung.codec.id, why, bytes=size)
        framer, stream = self._framers[rung.codec.id], rung.codec.encode(blocks, sinks=SINK_TOKENS if begins else 0)
        rung.encoded(size, len(stream))
        if len(stream) >= size:
            framer, stream = self._raw, self._raw.codec.encode(blocks)
        self._metrics.compression.add(size, len(stream), tier=self._tier)
        sums = checksum_of(stream)
        page = framer.pack(keys[-1].tobytes(), namespace, len(stream), sums, size=_PAGE, blocks=len(blocks))
        return [memoryview(page), stream.data]

    def decode(self, stored: Octets, key: bytes, blocks: int, wanted: range, rows: Rows) -> Reason | None:
        """Puts the blocks `wanted` of an object of `blocks`, whose last one is `key`, into their rows; or why not.

        stored: uint8, all that came of the object; 4-aligned. Where the answer is a reason the rows hold anything.
        """
        frame = parse(stored[:_PAGE].data)
        if isinstance(frame, Reason):
            return frame
        framer = self._framer(frame.codec)
        if framer is None:
            return Reason.FOREIGN
        header = framer.expect(stored[:_PAGE].data, key, blocks)
        if not isinstance(header, FrameHeader):
            return header
        stream = stored[_PAGE:]
        if not header.verifies(stream):
            return Reason.CORRUPT
        begun = time.perf_counter()
        if not self._unpack(framer.codec, stream, blocks, wanted, rows):
            return Reason.CORRUPT
        seconds = time.perf_counter() - begun
        self._ladder.decoded(frame.codec, blocks * self._block_bytes, seconds)
        self._metrics.decompression.observe(seconds, tier=self._tier)
        return None

    def _unpack(self, codec: Codec, stream: Octets, blocks: int, wanted: range, rows: Rows) -> bool:
        span = _neighbours(rows) if len(wanted) == blocks else None
        if span is not None:
            return codec.decode(stream, span)
        out = np.empty((blocks, self._block_bytes), np.uint8)
        if not codec.decode(stream, out):
            return False
        for block, row in zip(wanted, rows.ids, strict=True):
            np.copyto(rows.memory[row, : self._block_bytes], out[block])
        return True

    def _framer(self, codec_id: str) -> Framer | None:
        """Reads what a codec has stored; None for one that may not be in this family, whoever has put it there."""
        if codec_id not in self._framers:
            codec = self._ladder.reader(codec_id)
            if codec is None or not (codec.lossless or self._ladder.lossy):
                return None
            self._framers[codec_id] = Framer(codec)
        return self._framers[codec_id]


def _neighbours(rows: Rows) -> Octets | None:
    """The rows as one array without a copy, where each follows the one before."""
    first, count = int(rows.ids[0]), len(rows.ids)
    return rows.memory[first : first + count] if (np.diff(rows.ids) == 1).all() else None


def _gathered(rows: Rows) -> Octets:
    """The rows as one array: a copy."""
    out = np.empty((len(rows.ids), rows.memory.shape[1]), np.uint8)
    for target, row in zip(out, rows.ids, strict=True):
        np.copyto(target, rows.memory[row])
    return out
