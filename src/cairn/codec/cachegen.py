"""The `cachegen` codec: a step a head, anchors, exact sinks, entropy coding on 32 lanes; several levels of quality.

After CacheGen (Liu et al., SIGCOMM 2024, arXiv 2310.07240): KV is quantized by layer and then coded by channel. What is
kept from it: more bits where the model is sensitive, several levels so that a stream can follow the bandwidth. What is
not: an absmax over all channels, a frequency table a channel in every stream, an anchor token.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.codec import sections, tables
from cairn.codec.base import Codec, Octets
from cairn.codec.calibration import Calibration
from cairn.codec.floats import Bits, bits_of, kind_of
from cairn.codec.levels import LEVELS, Level
from cairn.codec.parts import groups_a_stream
from cairn.codec.rotary import Rotary, sines
from cairn.errors import InputError
from cairn.kv import KVGeometry

#: What a sequence of so many tokens in one stream is cut to.
_MOST_TOKENS: Final = 1 << 16

_HEAD: Final = 4 * sections.HEADER_WORDS


class Coded(NamedTuple):
    """A stream, and what its header says, not checked yet but for sizes: `offsets` uint32 [layers], where each layer
    begins; `turns` uint32 [pairs], `first`: see `Rotary`.
    """

    stored: Octets
    offsets: npt.NDArray[np.uint32]
    groups: int
    turns: npt.NDArray[np.uint32]
    first: int
    tokens: int


class Plain(NamedTuple):
    """Rows to encode, and how: `steps` float32 [layers, planes], in deviations of a head; `sinks` leading tokens exact;
    `turns` and `first` as in `Coded`. Planes begin at byte `begin` of a stream, which has `limit` bytes at most.
    """

    rows: Bits
    steps: npt.NDArray[np.float32]
    sinks: int
    groups: int
    turns: npt.NDArray[np.uint32]
    first: int
    begin: int
    limit: int


class CacheGen(Codec):
    """Lossy, of variable rate. level: what `encode` promises unless told otherwise. calibration: of the model, which
    makes everything smaller. A stream carries what it takes to read it; readers need to know neither. Thread-safe.
    """

    id = "cachegen"
    lossless = False

    def __init__(
        self, geometry: KVGeometry, level: Level = LEVELS["high"], calibration: Calibration | None = None
    ) -> None:
        super().__init__(geometry)
        self._kind = kind_of(geometry)
        self._level = level
        if calibration:
            calibration.check(geometry)
        self._calibration = calibration
        self._rotary = (calibration and calibration.rotary) or Rotary(())
        shared = tables.shared_tables()
        self._decoder = shared.decoder
        self._encoding = tables.class_edges(), tables.classes(), shared.encoder

    def stored_bytes_limit(self, blocks: int = 1) -> int:
        """What does not get smaller is stored as it is, behind a header."""
        return blocks * self.geometry.block_bytes + _HEAD

    def encode(self, blocks: Octets, *, sinks: int = 0, level: Level | None = None) -> Octets:
        """As the contract says. level: instead of the codec's own."""
        return self.encode_at((level or self._level).relative_steps(self.geometry, self._calibration), blocks, sinks)

    def encode_at(self, steps: npt.NDArray[np.float32], blocks: Octets, sinks: int = 0) -> Octets:
        """As `encode`, at steps float32 [layers, planes], in deviations of a head."""
        g, rows = self.geometry, self.rows(blocks)
        tokens = len(rows) * g.block_tokens
        if tokens > _MOST_TOKENS:
            raise InputError(f"{tokens} tokens in one stream: at most {_MOST_TOKENS}; encode fewer blocks at a time")
        groups = groups_a_stream(tokens, g.kv_heads * g.head_dim)
        turns, first = np.array(self._rotary.turns, np.uint32), self._rotary.first
        begin, limit = _HEAD + 4 * (g.layers + len(turns)), self.stored_bytes_limit(len(rows))
        out = None
        if begin < limit:
            out = self._encode_planes(
                Plain(bits_of(rows, self._kind), steps, sinks, groups, turns, first, begin, limit)
            )
        if out is None:
            return self._raw(rows, tokens)
        head = out[:begin].view(np.uint32)
        head[: sections.HEADER_WORDS] = sections.MAGIC, tokens, groups | first << 8, len(turns), len(out)
        head[sections.HEADER_WORDS + g.layers :] = turns
        return out

    def _encode_planes(self, plain: Plain) -> Octets | None:
        """A stream whose header has the layers' places and nothing else yet; None if it is longer than the limit."""
        g, (blocks, _) = self.geometry, plain.rows.shape
        out = np.empty((plain.limit + 3) // 4 * 4, np.uint8)
        end = sections.encode_planes(
            plain.rows,
            g.block_shape,
            self._kind,
            plain.groups,
            plain.steps,
            plain.sinks,
            sines(plain.turns, blocks * g.block_tokens),
            plain.first,
            self._encoding,
            plain.begin,
            out,
            out[_HEAD : _HEAD + 4 * g.layers].view(np.uint32),
        )
        return out[:end].copy() if 0 <= end <= plain.limit else None

    def decode(self, stored: Octets, out: Octets, layers: range | None = None) -> bool:
        """layers: of these only; all unless given."""
        g, rows = self.geometry, self.rows(out)
        tokens = len(rows) * g.block_tokens
        if len(stored) < _HEAD or len(stored) > self.stored_bytes_limit(len(rows)):
            return False
        if not stored.flags.aligned or stored.ctypes.data % 4 or not stored.flags.c_contiguous:
            stored = stored.copy()
        magic, found_tokens, packed, pairs, length = stored[:_HEAD].view(np.uint32).tolist()
        if magic != sections.MAGIC or found_tokens != tokens or length != len(stored):
            return False
        groups, first = packed & 255, packed >> 8
        if groups == 0:
            return self.put_plain(stored[_HEAD:], rows)
        begin = _HEAD + 4 * (g.layers + pairs)
        if len(stored) % 4 or begin > len(stored) or first + 2 * pairs > g.head_dim:
            return False
        numbers = stored[_HEAD:begin].view(np.uint32)
        coded = Coded(stored, numbers[: g.layers], groups, numbers[g.layers :], first, tokens)
        return self._decode_layers(coded, layers if layers is not None else range(g.layers), bits_of(rows, self._kind))

    def _decode_layers(self, coded: Coded, layers: range, rows: Bits) -> bool:
        """Fills these layers of rows [blocks, elements]; False if there is no such stream."""
        return bool(
            sections.decode_planes(
                coded.stored,
                coded.offsets,
                layers.start,
                layers.stop,
                self.geometry.block_shape,
                self._kind,
                coded.groups,
                sines(coded.turns, coded.tokens),
                coded.first,
                self._decoder,
                rows,
            )
        )

    def _raw(self, rows: Octets, tokens: int) -> Octets:
        head = np.array([sections.MAGIC, tokens, 0, 0, self.stored_bytes_limit(len(rows))], np.uint32)
        return np.concatenate([head.view(np.uint8), self.plain(rows)])
