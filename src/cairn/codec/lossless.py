"""Codecs that give every bit back: `lossless`, exponents by rANS, and `packed`, exponents in three bits.

The values of a channel are of one size, so the distance of an exponent from the largest one of its channel takes 2 to 3
bits of 8, while mantissas are noise (the same split: ZipNN, arXiv 2411.05239; DFloat11, arXiv 2504.11651).
"""

from collections.abc import Callable
from typing import Any, ClassVar, Final

import numpy as np

from cairn.codec.base import Codec, Octets
from cairn.codec.exponents import decode_exponents, encode_exponents
from cairn.codec.floats import bits_of, kind_of
from cairn.codec.packed_planes import decode_packed, encode_packed
from cairn.codec.parts import groups_a_stream
from cairn.kv import KVGeometry

_HEAD: Final = 16


class Exact(Codec):
    """Of variable rate. A stream is u32 [4]: magic, tokens, groups a stream, length in bytes (groups 0: the blocks as
    they are follow); u32 [layers] where each layer begins; the planes, written and read by kernels. Thread-safe."""

    lossless = True
    _magic: ClassVar[int]
    _encode: ClassVar[Callable[..., Any]]
    _decode: ClassVar[Callable[..., Any]]

    def __init__(self, geometry: KVGeometry) -> None:
        super().__init__(geometry)
        self._kind = kind_of(geometry)

    def stored_bytes_limit(self, blocks: int = 1) -> int:
        """What does not get smaller is stored as it is, behind a header."""
        return blocks * self.geometry.block_bytes + _HEAD

    def encode(self, blocks: Octets, *, sinks: int = 0) -> Octets:
        g, rows = self.geometry, self.rows(blocks)
        tokens, limit = len(rows) * g.block_tokens, self.stored_bytes_limit(len(rows))
        groups = groups_a_stream(tokens, g.kv_heads * g.head_dim)
        out = np.empty((limit + 3) // 4 * 4, np.uint8)
        head, begin = out.view(np.uint32), _HEAD + 4 * g.layers
        bits = bits_of(rows, self._kind)
        end = -1
        if begin < len(out):
            end = type(self)._encode(bits, g.block_shape, self._kind, groups, begin, out, head[4 : 4 + g.layers])
        if not 0 <= end <= limit:
            groups, end = 0, limit
            out[_HEAD:end] = self.plain(rows)
        head[:4] = self._magic, tokens, groups, end
        return out[:end].copy()

    def decode(self, stored: Octets, out: Octets, layers: range | None = None) -> bool:
        """layers: of these only; all unless given."""
        g, rows = self.geometry, self.rows(out)
        if len(stored) < _HEAD or len(stored) > self.stored_bytes_limit(len(rows)):
            return False
        if stored.ctypes.data % 4 or not stored.flags.c_contiguous:
            stored = stored.copy()
        magic, tokens, groups, length = stored[:_HEAD].view(np.uint32).tolist()
        if magic != self._magic or tokens != len(rows) * g.block_tokens or length != len(stored):
            return False
        if groups == 0:
            return self.put_plain(stored[_HEAD:], rows)
        begin = _HEAD + 4 * g.layers
        if len(stored) % 4 or begin > len(stored) or groups != groups_a_stream(tokens, g.kv_heads * g.head_dim):
            return False
        span = layers if layers is not None else range(g.layers)
        offsets, bits = stored[_HEAD:begin].view(np.uint32), bits_of(rows, self._kind)
        return bool(type(self)._decode(stored, offsets, span.start, span.stop, g.block_shape, self._kind, groups, bits))


class Lossless(Exact):
    """The smallest: about 10.6 bits of 16 (`exponents`)."""

    id = "lossless"
    _magic = 0x314C4B43  # "CKL1"
    _encode = staticmethod(encode_exponents)
    _decode = staticmethod(decode_exponents)


class Packed(Exact):
    """The fastest: about 11.2 bits of 16 (`packed_planes`)."""

    id = "packed"
    _magic = 0x31504B43  # "CKP1"
    _encode = staticmethod(encode_packed)
    _decode = staticmethod(decode_packed)
