"""The bytes of a `lossless` plane, and its kernels. Parts padded to 4 bytes, little-endian:

    exact       u32: how many vectors (one token in one head) are stored whole
    spans       u32 [streams], states u32 [streams, 32]: as in `sections`
    frequencies u16 [32], which sum to 1024: how often an exponent is so far below its channel's largest
    largest     u8 [channels]: the largest exponent
    places      u32 [exact], vectors [exact, dim]: as in `sections`
    low         u8 [tokens, channels, bytes]: sign and mantissa, or of float16 the low 8 bits of them
    words       u16: the streams

A vector with an exponent 32 or more below its channel's largest is stored whole. The 3 high bits that float16 has left
over go with the symbols.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cairn.codec.floats import FLOAT16, FLOAT32, Bits
from cairn.codec.rans import LANES, decode_stream, encode_stream
from cairn.codec.tables import HALF, SLOTS, SYMBOLS
from cairn.jit import kernel

_HALF_LOW: Final = 3

Words = npt.NDArray[np.uint32]


@kernel
def _up(size: Any) -> Any:
    return (size + 3) // 4 * 4


@kernel
def _split(bits: Any, kind: int) -> Any:
    """(exponent, sign and mantissa) of an element."""
    bits = np.int64(bits)
    if kind == FLOAT32:
        return bits >> 23 & 255, (bits >> 31) << 23 | bits & 0x7FFFFF
    if kind == FLOAT16:
        return bits >> 10 & 31, (bits >> 15) << 10 | bits & 0x3FF
    return bits >> 7 & 255, (bits >> 15) << 7 | bits & 0x7F


@kernel
def _join(exponent: Any, rest: Any, kind: int) -> Any:
    """The inverse of `_split`."""
    if kind == FLOAT32:
        return (rest >> 23) << 31 | exponent << 23 | rest & 0x7FFFFF
    if kind == FLOAT16:
        return (rest >> 10) << 15 | exponent << 10 | rest & 0x3FF
    return (rest >> 7) << 15 | exponent << 7 | rest & 0x7F


@kernel
def _normalize(counts: npt.NDArray[np.int64], frequencies: npt.NDArray[np.int64]) -> None:
    """Frequencies of at least 1 that sum to SLOTS, in proportion to counts."""
    total, given, top = max(counts.sum(), 1), 0, 0
    for s in range(SYMBOLS):
        frequencies[s] = 1 + counts[s] * (SLOTS - SYMBOLS) // total
        given += frequencies[s]
        if frequencies[s] > frequencies[top]:
            top = s
    frequencies[top] += SLOTS - given


@kernel
def encode_exponents(
    rows: Bits,
    shape: tuple[int, int, int, int, int],
    kind: int,
    groups: int,
    begin: int,
    out: npt.NDArray[np.uint8],
    offsets: Words,
) -> int:
    """Writes every plane from out[begin] on; returns where it ends, or -1 where `out` has no room."""
    layers, planes, block_tokens, heads, dim = shape
    tokens, channels = len(rows) * block_tokens, heads * dim
    total = (channels + LANES - 1) // LANES
    streams = (total + groups - 1) // groups
    low_bytes = 3 if kind == FLOAT32 else 1
    element = 4 if kind == FLOAT32 else 2
    shift = _HALF_LOW if kind == FLOAT16 else 0
    out16, out32 = out.view(np.uint16), out.view(np.uint32)
    residuals = np.empty((tokens, channels), np.int16)
    exact = np.empty((tokens, heads), np.uint8)
    words, states = np.empty(tokens * groups * LANES, np.uint16), np.empty(LANES, np.uint32)
    classes = np.full(channels, shift << 4, np.uint8)
    counts, frequencies = np.empty(SYMBOLS, np.int64), np.empty(SYMBOLS, np.int64)
    encoder, largest = np.empty(SYMBOLS, np.uint32), np.empty(channels, np.int64)
    at = begin
    for layer in range(layers):
        offsets[layer] = at
        for plane in range(planes):
            offset = (layer * planes + plane) * block_tokens * channels
            largest[:] = 0
            for t in range(tokens):
                row = rows[t // block_tokens, offset + t % block_tokens * channels :]
                for c in range(channels):
                    largest[c] = max(largest[c], _split(row[c], kind)[0])
            found = 0
            exact[:] = 0
            counts[:] = 0
            for t in range(tokens):
                row = rows[t // block_tokens, offset + t % block_tokens * channels :]
                for h in range(heads):
                    for c in range(h * dim, (h + 1) * dim):
                        if largest[c] - _split(row[c], kind)[0] >= SYMBOLS:
                            exact[t, h] = 1
                    found += exact[t, h]
                    for c in range(h * dim, (h + 1) * dim):
                        exponent, rest = _split(row[c], kind)
                        below = np.int64(0) if exact[t, h] else largest[c] - exponent
                        counts[below] += 1
                        high = rest >> 8 if kind == FLOAT16 and not exact[t, h] else np.int64(0)
                        residuals[t, c] = np.int16((below - HALF) << shift | high)
            _normalize(counts, frequencies)
            start = 0
            for s in range(SYMBOLS):
                encoder[s] = np.uint32(start << 16 | frequencies[s])
                start += frequencies[s]
            spans = at // 4 + 1
            table_at = at + 4 + 4 * streams * (1 + LANES)
            largest_at = table_at + 2 * SYMBOLS
            place_at = largest_at + _up(channels)
            vector_at = place_at + 4 * found
            low_at = vector_at + _up(found * dim * element)
            word_at = low_at + _up(tokens * channels * low_bytes)
            if word_at > len(out):
                return -1
            out[at:word_at] = 0
            out32[at // 4] = found
            for s in range(SYMBOLS):
                out16[table_at // 2 + s] = frequencies[s]
            for c in range(channels):
                out[largest_at + c] = largest[c]
            i = 0
            for t in range(tokens):
                row = rows[t // block_tokens, offset + t % block_tokens * channels :]
                for c in range(channels):
                    rest = _split(row[c], kind)[1]
                    for byte in range(low_bytes):
                        out[low_at + (t * channels + c) * low_bytes + byte] = rest >> 8 * byte & 255
                for h in range(heads):
                    if exact[t, h]:
                        out32[place_at // 4 + i] = t * heads + h
                        for d in range(dim):
                            bits = np.int64(row[h * dim + d])
                            for byte in range(element):
                                out[vector_at + (i * dim + d) * element + byte] = bits >> 8 * byte & 255
                        i += 1
            for stream in range(streams):
                some = min(groups, total - stream * groups)
                count = encode_stream(residuals, stream * groups, some, classes, encoder, words, states)
                if word_at + 2 * count > len(out):
                    return -1
                out32[spans + stream] = count
                for lane in range(LANES):
                    out32[spans + streams + stream * LANES + lane] = states[lane]
                out16[word_at // 2 : word_at // 2 + count] = words[:count]
                word_at += 2 * count
            if word_at % 4:
                if word_at + 2 > len(out):
                    return -1
                out16[word_at // 2] = 0
            at = _up(word_at)
    return at


@kernel
def decode_exponents(
    stored: npt.NDArray[np.uint8],
    offsets: Words,
    first_layer: int,
    last_layer: int,
    shape: tuple[int, int, int, int, int],
    kind: int,
    groups: int,
    rows: Bits,
) -> bool:
    """Fills layers first_layer ... last_layer - 1 of every row; False if `stored` is no such stream.

    stored: a multiple of 4 bytes, 4-aligned. Every length and place is checked before it is used.
    """
    _, planes, block_tokens, heads, dim = shape
    tokens, channels = len(rows) * block_tokens, heads * dim
    total = (channels + LANES - 1) // LANES
    streams = (total + groups - 1) // groups
    low_bytes = 3 if kind == FLOAT32 else 1
    element = 4 if kind == FLOAT32 else 2
    shift = _HALF_LOW if kind == FLOAT16 else 0
    size = len(stored)
    stored16, stored32 = stored.view(np.uint16), stored.view(np.uint32)
    residuals, states = np.empty((tokens, channels), np.int16), np.empty(LANES, np.uint32)
    classes = np.full(channels, shift << 4, np.uint8)
    decoder = np.empty(SLOTS, np.uint32)
    for layer in range(first_layer, last_layer):
        at = np.int64(offsets[layer])
        for plane in range(planes):
            table_at = at + 4 + 4 * streams * (1 + LANES)
            largest_at = table_at + 2 * SYMBOLS
            place_at = largest_at + _up(channels)
            low_size = _up(tokens * channels * low_bytes)
            if at % 4 or place_at + low_size > size:
                return False
            found = np.int64(stored32[at // 4])
            vector_at = place_at + 4 * found
            low_at = vector_at + _up(found * dim * element)
            word_at = low_at + low_size
            if found > tokens * heads or word_at > size:
                return False
            slot = np.int64(0)
            for s in range(SYMBOLS):
                frequency = np.int64(stored16[table_at // 2 + s])
                if frequency < 1 or slot + frequency > SLOTS:
                    return False
                for i in range(frequency):
                    decoder[slot + i] = np.uint32(s << 22 | frequency << 11 | i)
                slot += frequency
            if slot != SLOTS:
                return False
            spans = at // 4 + 1
            for stream in range(streams):
                count = np.int64(stored32[spans + stream])
                if word_at + 2 * count > size:
                    return False
                for lane in range(LANES):
                    states[lane] = stored32[spans + streams + stream * LANES + lane]
                begin, some = word_at // 2, min(groups, total - stream * groups)
                if not decode_stream(
                    stored16, begin, begin + count, states, stream * groups, some, classes, decoder, residuals
                ):
                    return False
                word_at += 2 * count
            offset = (layer * planes + plane) * block_tokens * channels
            for t in range(tokens):
                place = offset + t % block_tokens * channels
                target = rows[t // block_tokens, place : place + channels]
                low = stored[low_at + t * channels * low_bytes :]
                for c in range(channels):
                    residual = np.int64(residuals[t, c])
                    rest = np.int64(low[c * low_bytes])
                    if kind == FLOAT32:
                        rest |= np.int64(low[c * 3 + 1]) << 8 | np.int64(low[c * 3 + 2]) << 16
                    if kind == FLOAT16:
                        rest |= (residual & ((1 << _HALF_LOW) - 1)) << 8
                    exponent = np.int64(stored[largest_at + c]) - (residual >> shift) - HALF
                    target[c] = _join(exponent & 255, rest, kind)
            for i in range(found):
                where: Any = np.int64(stored32[place_at // 4 + i])
                if where >= tokens * heads:
                    return False
                t, h = where // heads, where % heads
                place = offset + t % block_tokens * channels + h * dim
                for d in range(dim):
                    whole: Any = np.int64(0)
                    for byte in range(element):
                        whole |= np.int64(stored[vector_at + (i * dim + d) * element + byte]) << 8 * byte
                    rows[t // block_tokens, place + d] = whole
            at = _up(word_at)
    return True
