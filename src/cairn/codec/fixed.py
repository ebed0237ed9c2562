"""Codecs of fixed rate, for tiers of fixed slots: `int8`, `int4` and `fp8`, a scale for every 32 elements."""

from typing import ClassVar, Final

import numpy as np

from cairn.codec.base import SINK_TOKENS, Codec, Octets
from cairn.codec.fixed_planes import decode_fixed, encode_fixed, plane_bytes
from cairn.codec.floats import bits_of, kind_of
from cairn.kv import KVGeometry

#: "CKF1".
_MAGIC: Final = 0x31464B43
_HEAD: Final = 16


class _Fixed(Codec):
    """header u32 [4]: magic, tokens, sinks, length in bytes; the sinks as they are, uint8 [layers, planes, sinks,
    vector_bytes]; the planes (`fixed_planes`). Two objects of as many blocks and sinks have one size. Thread-safe."""

    lossless = False
    bits: ClassVar[int]
    floating: ClassVar[bool] = False

    def __init__(self, geometry: KVGeometry) -> None:
        super().__init__(geometry)
        self._kind = kind_of(geometry)

    def stored_bytes_limit(self, blocks: int = 1) -> int:
        return self.stored_bytes(blocks, min(SINK_TOKENS, blocks * self.geometry.block_tokens))

    def stored_bytes(self, blocks: int, sinks: int = 0) -> int:
        """The size of so many blocks, with so many tokens kept exact."""
        g = self.geometry
        tokens, channels = blocks * g.block_tokens, g.kv_heads * g.head_dim
        sizes = [
            plane_bytes(tokens, channels, g.planes == 2 and plane == 0, self.bits, self.floating)
            for plane in range(g.planes)
        ]
        return int(_HEAD + sinks * g.token_bytes + g.layers * sum(size + size % 2 for size in sizes))

    def encode(self, blocks: Octets, *, sinks: int = 0) -> Octets:
        """As the contract says; at most SINK_TOKENS tokens are kept exact."""
        g, rows = self.geometry, self.rows(blocks)
        sinks = min(sinks, SINK_TOKENS, len(rows) * g.block_tokens)
        size = self.stored_bytes(len(rows), sinks)
        out = np.zeros(size + size % 2, np.uint8)
        out[:_HEAD].view(np.uint32)[:] = _MAGIC, len(rows) * g.block_tokens, sinks, size
        begin = _HEAD + sinks * g.token_bytes
        sunk = out[_HEAD:begin].reshape(g.layers, g.planes, sinks, g.vector_bytes)
        for token in range(sinks):
            sunk[:, :, token] = self._token(rows, token)
        bits = bits_of(rows, self._kind)
        encode_fixed(bits, g.block_shape, self._kind, self.bits, self.floating, sinks, out, begin)
        return out[:size]

    def decode(self, stored: Octets, out: Octets, layers: range | None = None) -> bool:
        """layers: of these only; all unless given."""
        g, rows = self.geometry, self.rows(out)
        tokens = len(rows) * g.block_tokens
        if len(stored) < _HEAD:
            return False
        if stored.ctypes.data % 4 or len(stored) % 2 or not stored.flags.c_contiguous:
            stored = np.concatenate([stored, np.zeros(len(stored) % 2, np.uint8)])
        magic, found_tokens, sinks, length = stored[:_HEAD].view(np.uint32).tolist()
        if magic != _MAGIC or found_tokens != tokens or sinks > min(SINK_TOKENS, tokens):
            return False
        if length != self.stored_bytes(len(rows), sinks) or len(stored) != length + length % 2:
            return False
        span = layers if layers is not None else range(g.layers)
        begin = _HEAD + sinks * g.token_bytes
        bits = bits_of(rows, self._kind)
        decode_fixed(stored, begin, span.start, span.stop, g.block_shape, self._kind, self.bits, self.floating, bits)
        sunk = stored[_HEAD:begin].reshape(g.layers, g.planes, sinks, g.vector_bytes)
        for token in range(sinks):
            self._token(rows, token)[span.start : span.stop] = sunk[span.start : span.stop, :, token]
        return True

    def _token(self, rows: Octets, token: int) -> Octets:
        """All of a token's bytes, uint8 [layers, planes, vector_bytes]: a view."""
        g = self.geometry
        row = rows[token // g.block_tokens, : g.block_bytes]
        block: Octets = row.reshape(g.layers, g.planes, g.block_tokens, g.vector_bytes)
        return block[:, :, token % g.block_tokens]


class Int8(_Fixed):
    """9 bits an element of 16."""

    id = "int8"
    bits = 8


class Int4(_Fixed):
    """5 bits an element of 16."""

    id = "int4"
    bits = 4


class Fp8(_Fixed):
    """8.5 bits an element of 16: float8 e4m3 under a scale."""

    id = "fp8"
    bits = 8
    floating = True
