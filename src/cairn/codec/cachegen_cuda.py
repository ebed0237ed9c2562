"""`cachegen` on a GPU: the same bits as the CPU's, tens of times as fast as a core.

To be decoded, a stream crosses the bus as it is stored, its planes are decoded by one kernel into blocks in GPU memory,
and these come back into the caller's rows, which are pinned where they are an arena's. Encoding: `encoder_cuda`. What a
GPU cannot do at the moment (it has no memory left, a stream is asked for by layers, or not cut as usual) the CPU does.
"""

import logging
from functools import cache
from typing import Any

import numpy as np
import torch
from triton.errors import TritonError

from cairn.codec import sections, triton_kernels
from cairn.codec.cachegen import CacheGen, Coded, Plain
from cairn.codec.calibration import Calibration
from cairn.codec.encoder_cuda import Encoder
from cairn.codec.floats import Bits
from cairn.codec.lane_cuda import DTYPES, Lane
from cairn.codec.levels import LEVELS, Level
from cairn.codec.parts import Octets, Shape, groups_a_stream, streams_of
from cairn.codec.planes import STEPS
from cairn.codec.rans import LANES
from cairn.codec.tables import shared_tables
from cairn.errors import ConfigError
from cairn.kv import KVGeometry
from cairn.observe.log import log_once

log = logging.getLogger(__name__)


class Planes(Lane):
    """All planes of a stream, decoded on one device. Memory is torch's, which keeps it for the next stream."""

    def __init__(self, device: str) -> None:
        """Raises RuntimeError where there is no such device."""
        super().__init__(device)
        with self.enqueueing():
            self._decoder = self.put(shared_tables().decoder)

    def decode(self, coded: Coded, shape: Shape, dtype: str, rows: Bits) -> bool:
        """Fills rows [blocks, >= elements of a block]; False if there is no such stream. Raises RuntimeError where the
        device fails; what is in the rows is then not known.
        """
        layers, planes, _, heads, dim = shape
        count, channels = layers * planes, heads * dim
        streams = int(streams_of(channels, coded.groups))
        spans, states = np.empty((count, streams, 2), np.int64), np.empty((count, streams, LANES), np.uint32)
        codes, classes = np.empty((count, heads), np.uint8), np.empty((count, channels), np.uint8)
        anchors, vectors = np.empty((count, channels), np.int16), np.empty((count, 2), np.int64)
        found = spans, states, codes, classes, anchors, vectors
        size = rows.itemsize
        if not sections.locate_planes(coded.stored, coded.offsets, shape, coded.tokens, coded.groups, size, *found):
            return False
        with self.enqueueing():
            whole = self._decode(coded, shape, dtype, rows, (spans, states, STEPS[codes], classes, anchors))
        return whole and bool(sections.patch_planes(coded.stored, vectors, shape, rows))

    def _decode(self, coded: Coded, shape: Shape, dtype: str, rows: Bits, parts: tuple[Any, ...]) -> bool:
        layers, planes, block_tokens, heads, dim = shape
        elements = layers * planes * block_tokens * heads * dim
        # A stream that is none reads on, a word a symbol at most: behind the last one there must be as many.
        slack = coded.tokens * LANES * coded.groups
        words = torch.empty(len(coded.stored) // 2 + slack, dtype=torch.uint16, device=self.device)
        words[: len(coded.stored) // 2].copy_(torch.from_numpy(coded.stored.view(np.uint16)))
        spans, states, steps, classes, anchors = (torch.from_numpy(part).to(self.device) for part in parts)
        blocks = torch.empty((len(rows), elements), dtype=DTYPES[dtype], device=self.device)
        wrong = torch.zeros(1, dtype=torch.int32, device=self.device)
        triton_kernels.decode(
            words,
            spans,
            states,
            classes,
            anchors,
            steps,
            self._decoder,
            self.turns(coded.turns.tobytes(), coded.tokens),
            blocks,
            torch.arange(layers * planes, device=self.device) * (block_tokens * heads * dim),
            wrong,
            tokens=coded.tokens,
            block_tokens=block_tokens,
            heads=heads,
            dim=dim,
            first=coded.first,
            groups=coded.groups,
            planes=planes,
        )
        torch.from_numpy(rows)[:, :elements].copy_(blocks.view(torch.int32 if rows.itemsize == 4 else torch.uint16))
        return not int(wrong)


@cache
def lanes_on(device: str) -> tuple[Encoder, Planes]:
    """For all codecs of a process; two, so that loads need not wait for stores. Raises ConfigError for a device that is
    not there.
    """
    try:
        return Encoder(device), Planes(device)
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"compression.device={device!r}: {why}; name a device of this machine, or cpu") from error


class CudaCacheGen(CacheGen):
    """As `CacheGen`. What cannot be done on the device is done here, with one line in the log."""

    def __init__(
        self,
        geometry: KVGeometry,
        level: Level = LEVELS["high"],
        calibration: Calibration | None = None,
        *,
        device: str = "cuda",
    ) -> None:
        super().__init__(geometry, level, calibration)
        self._encoder, self._planes = lanes_on(device)

    def _encode_planes(self, plain: Plain) -> Octets | None:
        try:
            return self._encoder.encode(plain, self.geometry.block_shape, self.geometry.dtype)
        except (RuntimeError, TritonError) as error:
            _log_failure("encode", error)
        return super()._encode_planes(plain)

    def _decode_layers(self, coded: Coded, layers: range, rows: Bits) -> bool:
        g = self.geometry
        usual = coded.groups == groups_a_stream(coded.tokens, g.kv_heads * g.head_dim)
        if usual and len(layers) == g.layers:
            try:
                return self._planes.decode(coded, g.block_shape, g.dtype, rows)
            except (RuntimeError, TritonError) as error:
                _log_failure("decode", error)
        return super()._decode_layers(coded, layers, rows)


def _log_failure(what: str, error: Exception) -> None:
    """error: torch's, such as that of a device without memory, or Triton's, of a kernel that it cannot make for it."""
    log_once(log, what, f"a stream was {what}d on the CPU: {str(error).partition(chr(10))[0]}")
