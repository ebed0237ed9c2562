"""Quantized rows: a block in a row of fixed size, for a tier of fixed slots that copiers read and write in passing.

Every 16 elements share a head of 16 bits, a scale and a zero point: value = (code + unit * zero) * scale. K is grouped
along tokens, channel by channel, since its channels differ; V (and an MLA latent) along channels, token by token, since
its tokens do (KIVI: Liu et al., arXiv 2402.02750). A group is as long as the shortest block, so an element takes 1 bit
more than its code, 5 or 9. `codec.fixed` groups 32, which a block of 16 tokens has not got along tokens, and its heads
of 32 bits would take 2 bits an element there.

A plane of a layer (K or V) is heads u8 [groups, 2], then codes [tokens, channels * bits / 8], of 4 bits the even
channel in the low half. Where codes have 4 bits, the first of every 16 tokens of K has 4 bits more: fine [tokens / 16,
channels / 2], behind a layer's planes, in sixteenths of a scale, of which 8 are none. A sequence's first token is among
them, which attention sinks on (arXiv 2309.17453): most of what 4 bits cost was its K.

A head is the scale in its first byte, and the zero point, signed, in its second. Scales have 5 bits of
exponent and 3 of mantissa, 2^-16 to 1.75 * 2^15, and are never too small for their group: an element is off by half a
scale at most. A scale is the next one above the larger of range / (2^bits - unit) and largest / (127 * unit). The unit
is 8 for 8 bits, so that a channel far from zero loses nothing; for 4 bits it is 1, as these have no codes to spare.
The last scale means a group with a value that is not finite, or too large: all of it comes back as NaN.

`fp8` has no zero points: value = e4m3(code) * scale (`floats.E4M3`). A head is the scale, u8 [groups, 1], so an element
takes 8.5 bits; it is the next one above largest / 448, so that the largest is in e4m3's top binade. What comes back has
8 bits of mantissa at most, exact as float32 and bfloat16, and is off by a 16th of itself, however large its neighbours
are; where it is below 2^-6 scales, by 2^-10 of a scale.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from cairn.codec.base import Octets
from cairn.codec.floats import BFLOAT16, E4M3, E4M3_MAX, FLOAT16, FLOAT16_MAX, Bits, kind_of, narrow, to_e4m3, widen
from cairn.errors import GeometryError
from cairn.jit import kernel
from cairn.kv import KVGeometry

#: Elements of a group.
GROUP: Final = 16
#: What is added to a scale's byte to make it the upper 12 bits of its float32.
SCALE_OFFSET: Final = (127 - 16) << 3
NAN_SCALE: Final = 255
MOST_ZERO: Final = 127
#: A NaN of each kind.
NANS: Final = (0x7FC0, 0x7E00, 0x7FC00000)
_INFINITY: Final = 0x7F800000
_BITS: Final = {"int8": 8, "fp8": 8, "int4": 4}
#: Of a zero point; 0: there is none, and codes are e4m3.
_UNITS: Final = {"int8": 8, "fp8": 0, "int4": 1}
#: Raised when the meaning of the bytes changes.
_VERSION: Final = 1

Floats = npt.NDArray[np.float32]


class Quantizer:
    """Blocks of one geometry <-> quantized rows. Immutable, thread-safe.

    stored: the geometry of the rows: as if a vector had bits / 8 + head_bytes / 16 bytes an element, and 1/64 more with
    `fine`. All sizes follow from it: of a layer, of a block, of the parts that ranks hold. layout: what stands in a
    namespace for the rows' form.
    """

    def __init__(self, geometry: KVGeometry, codec: str) -> None:
        """Raises GeometryError for blocks whose values cannot be read, or are not whole groups."""
        self.geometry = geometry
        self.bits = _BITS[codec]
        self.unit = _UNITS[codec]
        self.head_bytes = 2 if self.unit else 1
        self.kind = kind_of(geometry, "storage.cpu.codec")
        for name in ("head_dim", "block_tokens"):
            if getattr(geometry, name) % GROUP:
                raise GeometryError(
                    f"{name}={getattr(geometry, name)}: storage.cpu.codec={codec} needs a multiple of {GROUP}; "
                    "set it to none"
                )
        self.fine = self.bits == 4 and geometry.planes == 2
        size = geometry.head_dim * (8 * self.bits + 4 * self.head_bytes + self.fine)
        self.stored = replace(geometry, head_dim=-(-size // 64), dtype="int8")
        self.layout = f"{codec}.{_VERSION}"

    def encode(self, block: Octets, row: Octets, layers: range) -> None:
        """Writes these layers of a row (uint8 [>= stored.block_bytes]). block: uint8 [geometry.block_bytes], canonical;
        both contiguous. Frees the GIL."""
        _encode(*self._layers(block, row, layers), self._shape(layers), self.kind, self.bits, self.unit, self.fine)

    def decode(self, row: Octets, block: Octets, layers: range) -> None:
        """The reverse."""
        _decode(*self._layers(block, row, layers), self._shape(layers), self.kind, self.bits, self.unit, self.fine)

    def _layers(self, block: Octets, row: Octets, layers: range) -> tuple[Bits, Octets]:
        """Views of these layers: of the block's elements, and of the row."""
        word = np.uint32 if self.geometry.element_bytes == 4 else np.uint16
        raw, stored = self.geometry.layer_bytes, self.stored.layer_bytes
        return (
            block[layers.start * raw : layers.stop * raw].view(word),
            row[layers.start * stored : layers.stop * stored],
        )

    def _shape(self, layers: range) -> tuple[int, int, int, int]:
        g = self.geometry
        return len(layers), g.planes, g.block_tokens, g.kv_heads * g.head_dim


def quantizer_for(geometry: KVGeometry, codec: str) -> Quantizer | None:
    """By the name that `storage.cpu.codec` has for it; None for none. Raises as `Quantizer`."""
    return None if codec == "none" else Quantizer(geometry, codec)


@kernel
def _key(bits: Any) -> Any:
    """A float32's bits as an int32 that is ordered as the values are, NaN beyond infinity; and the way back."""
    return np.int32(bits ^ (bits >> np.int32(31) & np.int32(0x7FFFFFFF)))


@kernel
def _head(low_key: Any, high_key: Any, bits: int, unit: int) -> Any:
    """(head, 1 / scale, unit * zero) of a group; 1 / scale is 0 where it comes back as NaN."""
    if high_key >= _INFINITY or low_key <= ~_INFINITY:
        return NAN_SCALE, np.float32(0), np.float32(0)
    low, high = np.int32(_key(low_key)).view(np.float32), np.int32(_key(high_key)).view(np.float32)
    largest = max(abs(low), abs(high))
    if unit:
        by_range = (high - low) * np.float32(1 / ((1 << bits) - unit))
        wanted = max(by_range, largest * np.float32(1 / (MOST_ZERO * unit)))
    else:
        wanted = largest * np.float32(1 / E4M3_MAX)
    code = ((np.int64(np.float32(wanted).view(np.uint32)) + 0xFFFFF) >> 20) - SCALE_OFFSET
    if code >= NAN_SCALE:
        return NAN_SCALE, np.float32(0), np.float32(0)
    code = max(code, np.int64(0))
    inverse = np.float32(1) / np.uint32((code + SCALE_OFFSET) << 20).view(np.float32)
    if not unit:
        return code, inverse, np.float32(0)
    zero = np.rint((low * inverse - np.float32((unit - 1) / 2)) * np.float32(1 / unit))
    return code | (np.int64(zero) & 255) << 8, inverse, zero * np.float32(unit)


@kernel
def _plane(row: Octets, plane: int, shape: tuple[int, int, int, int], bits: int, unit: int) -> Any:
    """A plane's heads and codes, its layer's fine codes, and whether it is grouped along tokens."""
    layers, planes, tokens, channels = shape
    count, code_bytes, head_bytes = tokens * channels // GROUP, channels * bits // 8, 2 if unit else 1
    heads_end = head_bytes * count
    plane_bytes, layer_bytes = heads_end + tokens * code_bytes, len(row) // layers
    layer = row[plane // planes * layer_bytes : (plane // planes + 1) * layer_bytes]
    part = layer[plane % planes * plane_bytes : (plane % planes + 1) * plane_bytes]
    heads, codes = part[:heads_end].reshape(count, head_bytes), part[heads_end:].reshape(tokens, code_bytes)
    return heads, codes, layer[planes * plane_bytes :], planes == 2 and plane % 2 == 0


@kernel
def _encode(
    block: Bits, row: Octets, shape: tuple[int, int, int, int], kind: int, bits: int, unit: int, fine: bool
) -> None:
    layers, planes, tokens, channels = shape
    values = np.empty((GROUP, channels), np.float32)
    keys = values.view(np.int32)
    inverse, zero = np.empty(channels, np.float32), np.empty(channels, np.float32)
    found = np.empty(channels, np.float32)
    for plane in range(layers * planes):
        heads, every, more, along_tokens = _plane(row, plane, shape, bits, unit)
        for first in range(0, tokens, GROUP):
            for t in range(GROUP):
                source = block[(plane * tokens + first + t) * channels : (plane * tokens + first + t + 1) * channels]
                for c in range(channels):
                    values[t, c] = widen(source[c], kind)
            if along_tokens:
                low = np.full(channels, np.int32(0x7FFFFFFF))
                high = ~low
                for t in range(GROUP):
                    for c in range(channels):
                        key = _key(keys[t, c])
                        low[c], high[c] = min(low[c], key), max(high[c], key)
                for c in range(channels):
                    head, inverse[c], zero[c] = _head(low[c], high[c], bits, unit)
                    at = first // GROUP * channels + c
                    heads[at, -1], heads[at, 0] = head >> 8, head & 255  # the scale alone where a head is a byte
            for t in range(GROUP):
                if not along_tokens:
                    for c in range(0, channels, GROUP):
                        least, most = _key(keys[t, c]), _key(keys[t, c])
                        for i in range(c + 1, c + GROUP):
                            key = _key(keys[t, i])
                            least, most = min(least, key), max(most, key)
                        head, one_over, offset = _head(least, most, bits, unit)
                        at = ((first + t) * channels + c) // GROUP
                        heads[at, -1], heads[at, 0] = head >> 8, head & 255
                        inverse[c : c + GROUP], zero[c : c + GROUP] = one_over, offset
                if not unit:
                    _float_codes(values[t], inverse, every[first + t])
                    continue
                _whole_codes(values[t], inverse, zero, bits, found)
                if fine and along_tokens and t == 0:
                    _fine_codes(values[t], inverse, zero, found, more[first * channels // (2 * GROUP) :])
                _pack(found, bits, every[first + t])


@kernel
def _float_codes(values: Floats, inverse: Floats, codes: Octets) -> None:
    """Of a token; 0 where the group comes back as NaN, as below."""
    for c in range(len(codes)):
        code = to_e4m3(values[c] * inverse[c])
        codes[c] = np.uint8(code if inverse[c] > 0 else 0)


@kernel
def _whole_codes(values: Floats, inverse: Floats, zero: Floats, bits: int, found: Floats) -> None:
    top = np.float32((1 << bits) - 1)
    for c in range(len(found)):
        code = np.rint(values[c] * inverse[c]) - zero[c]
        found[c] = min(code, top) if code > 0 else np.float32(0)  # NaN: 0


@kernel
def _fine_codes(values: Floats, inverse: Floats, zero: Floats, found: Floats, more: Octets) -> None:
    """Codes of 8 bits, of which `more` gets the lower four."""
    for c in range(len(found)):
        code = np.rint((values[c] * inverse[c] - zero[c]) * np.float32(16)) + np.float32(8)
        sixteenths = np.uint8(min(code, np.float32(255)) if code > 0 else 8 * (inverse[c] == 0))
        found[c] = np.float32(sixteenths >> 4)
        more[c // 2] = sixteenths & 15 if c % 2 == 0 else more[c // 2] | (sixteenths & 15) << 4


@kernel
def _pack(found: Floats, bits: int, codes: Octets) -> None:
    if bits == 8:
        for c in range(len(found)):
            codes[c] = np.uint8(np.int32(found[c]))
    else:
        for c in range(len(found) // 2):
            codes[c] = np.uint8(np.int32(found[2 * c]) | np.int32(found[2 * c + 1]) << 4)


@kernel
def _decode(
    block: Bits, row: Octets, shape: tuple[int, int, int, int], kind: int, bits: int, unit: int, fine: bool
) -> None:
    layers, planes, tokens, channels = shape
    scale, zero = np.empty(channels, np.float32), np.empty(channels, np.float32)
    values = np.empty(channels, np.float32)
    words = values.view(np.uint32)
    for plane in range(layers * planes):
        heads, every, more, along_tokens = _plane(row, plane, shape, bits, unit)
        for t in range(tokens):
            if not along_tokens or t % GROUP == 0:
                first, width = (t // GROUP * channels, 1) if along_tokens else (t * channels // GROUP, GROUP)
                for group in range(channels // width):
                    number = heads[first + group, 0]
                    value = np.uint32((number + SCALE_OFFSET) << 20).view(np.float32)
                    c = group * width
                    scale[c : c + width] = np.float32(np.nan) if number == NAN_SCALE else value
                    zero[c : c + width] = np.float32(np.int8(heads[first + group, -1]) * unit)
            if unit:
                finer = fine and along_tokens and t % GROUP == 0
                _whole_values(every[t], more[t * channels // (2 * GROUP) :], finer, zero, scale, bits, values)
            else:
                for c in range(channels):
                    values[c] = E4M3[every[t, c]] * scale[c]
            target = block[(plane * tokens + t) * channels : (plane * tokens + t + 1) * channels]
            if kind == BFLOAT16:  # `narrow` without its case for NaN: there is but one here
                for c in range(channels):
                    word = words[c]
                    target[c] = (word + np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
                continue
            for c in range(channels):
                value = values[c]
                if kind == FLOAT16:
                    value = min(max(value, np.float32(-FLOAT16_MAX)), np.float32(FLOAT16_MAX))
                target[c] = NANS[kind] if np.isnan(scale[c]) else narrow(value, kind)


@kernel
def _whole_values(
    codes: Octets, more: Octets, finer: bool, zero: Floats, scale: Floats, bits: int, values: Floats
) -> None:
    """Of a token; finer: with what `_fine_codes` put into `more`."""
    if bits == 8:
        for c in range(len(values)):
            values[c] = codes[c]
    else:
        for c in range(len(codes)):
            values[2 * c], values[2 * c + 1] = codes[c] & 15, codes[c] >> 4
    if finer:
        for c in range(len(values)):
            sixteenths = more[c // 2] >> 4 * (c % 2) & 15
            values[c] += (np.float32(sixteenths) - np.float32(8)) * np.float32(1 / 16)
    for c in range(len(values)):
        values[c] = (values[c] + zero[c]) * scale[c]
