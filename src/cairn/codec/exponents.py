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

from cairn.codec.floats import FLOAT16, FLOAT32, Bits, join, split
from cairn.codec.parts import (
    Octets,
    Shape,
    Words,
    read_streams,
    read_vectors,
    spans_bytes,
    up,
    write_streams,
    write_vectors,
)
from cairn.codec.rans import LANES, Residuals
from cairn.codec.tables import HALF, SLOTS, SYMBOLS
from cairn.jit import kernel

_HALF_LOW: Final = 3


@kernel
def encode_exponents(rows: Bits, shape: Shape, kind: int, groups: int, begin: int, out: Octets, offsets: Words) -> int:
    """Writes every plane from out[begin] on; returns where it ends, or -1 where `out` has no room."""
    layers, planes, block_tokens, heads, dim = shape
    tokens, channels = len(rows) * block_tokens, heads * dim
    residuals = np.empty((tokens, channels), np.int16)
    exact = np.empty((tokens, heads), np.uint8)
    words = np.empty(tokens * groups * LANES, np.uint16)
    at = begin
    for layer in range(layers):
        offsets[layer] = at
        for plane in range(planes):
            offset = (layer * planes + plane) * block_tokens * channels
            at = _encode_plane(rows, offset, block_tokens, kind, groups, residuals, exact, words, out, at)
            if at < 0:
                return -1
    return at


@kernel
def _encode_plane(
    rows: Bits,
    offset: int,
    block_tokens: int,
    kind: int,
    groups: int,
    residuals: Residuals,
    exact: Octets,
    words: npt.NDArray[np.uint16],
    out: Octets,
    at: int,
) -> Any:
    """Writes one plane at out[at]; returns where it ends, or -1."""
    tokens, channels = residuals.shape
    dim = channels // exact.shape[1]
    largest, counts = np.zeros(channels, np.int64), np.zeros(SYMBOLS, np.int64)
    _find_largest(rows, offset, block_tokens, kind, tokens, largest)
    found = _make_symbols(rows, offset, block_tokens, kind, largest, exact, counts, residuals)
    frequencies = _normalized(counts)
    table_at, largest_at, place_at = _places(at, channels, groups)
    vector_at = place_at + 4 * found
    low_at = vector_at + up(found * dim * rows.itemsize)
    word_at = low_at + up(tokens * channels * _low_bytes(kind))
    if word_at > len(out):
        return -1
    out[at:low_at] = 0
    out[word_at - 4 : word_at] = 0
    out[at : at + 4].view(np.uint32)[0] = found
    table = out[table_at:largest_at].view(np.uint16)
    for s in range(SYMBOLS):
        table[s] = frequencies[s]
    for c in range(channels):
        out[largest_at + c] = largest[c]
    write_vectors(rows, offset, block_tokens, exact, dim, out, place_at, vector_at)
    _write_low(rows, offset, block_tokens, kind, channels, out, low_at)
    classes = np.full(channels, _symbol_shift(kind) << 4, np.uint8)
    return write_streams(residuals, groups, classes, _encoder(frequencies), words, out, at + 4, word_at)


@kernel
def _low_bytes(kind: int) -> Any:
    """Bytes of an element that are stored as they are."""
    return 3 if kind == FLOAT32 else 1


@kernel
def _symbol_shift(kind: int) -> Any:
    """Bits of an element that go with its symbol."""
    return _HALF_LOW if kind == FLOAT16 else 0


@kernel
def _places(at: Any, channels: int, groups: int) -> Any:
    """Where frequencies, largest exponents and places of the plane at `at` are."""
    table_at = at + 4 + spans_bytes(channels, groups)
    largest_at = table_at + 2 * SYMBOLS
    return table_at, largest_at, largest_at + up(channels)


@kernel
def _find_largest(
    rows: Bits, offset: int, block_tokens: int, kind: int, tokens: int, largest: npt.NDArray[np.int64]
) -> None:
    """The largest exponent of each channel; `largest` is zeros before."""
    for t in range(tokens):
        row = rows[t // block_tokens, offset + t % block_tokens * len(largest) :]
        for c in range(len(largest)):
            largest[c] = max(largest[c], split(row[c], kind)[0])


@kernel
def _make_symbols(
    rows: Bits,
    offset: int,
    block_tokens: int,
    kind: int,
    largest: npt.NDArray[np.int64],
    exact: Octets,
    counts: npt.NDArray[np.int64],
    residuals: Residuals,
) -> int:
    """Fills exact [tokens, heads], counts [SYMBOLS] (zeros before) and residuals; returns how many are exact."""
    (tokens, channels), heads, found = residuals.shape, exact.shape[1], 0
    dim, shift = channels // heads, _symbol_shift(kind)
    exact[:] = 0
    for t in range(tokens):
        row = rows[t // block_tokens, offset + t % block_tokens * channels :]
        for h in range(heads):
            for c in range(h * dim, (h + 1) * dim):
                if largest[c] - split(row[c], kind)[0] >= SYMBOLS:
                    exact[t, h] = 1
            found += exact[t, h]
            for c in range(h * dim, (h + 1) * dim):
                exponent, rest = split(row[c], kind)
                below = np.int64(0) if exact[t, h] else largest[c] - exponent
                counts[below] += 1
                high = rest >> 8 if kind == FLOAT16 and not exact[t, h] else np.int64(0)
                residuals[t, c] = np.int16((below - HALF) << shift | high)
    return found


@kernel
def _normalized(counts: npt.NDArray[np.int64]) -> Any:
    """Frequencies of at least 1 that sum to SLOTS, in proportion to counts; uint16 [SYMBOLS]."""
    frequencies = np.empty(SYMBOLS, np.uint16)
    total, given, top = np.int64(0), np.int64(0), 0
    for s in range(SYMBOLS):
        total += counts[s]
    total = max(total, np.int64(1))
    for s in range(SYMBOLS):
        frequencies[s] = 1 + counts[s] * (SLOTS - SYMBOLS) // total
        given += frequencies[s]
        if frequencies[s] > frequencies[top]:
            top = s
    frequencies[top] += SLOTS - given
    return frequencies


@kernel
def _encoder(frequencies: npt.NDArray[np.uint16]) -> Any:
    """What `encode_stream` takes for one table."""
    encoder, start = np.empty(SYMBOLS, np.uint32), np.int64(0)
    for s in range(SYMBOLS):
        encoder[s] = np.uint32(start << 16 | np.int64(frequencies[s]))
        start += frequencies[s]
    return encoder


@kernel
def _write_low(rows: Bits, offset: int, block_tokens: int, kind: int, channels: int, out: Octets, low_at: int) -> None:
    low_bytes = _low_bytes(kind)
    for t in range(len(rows) * block_tokens):
        row = rows[t // block_tokens, offset + t % block_tokens * channels :]
        low = out[low_at + t * channels * low_bytes :]
        for c in range(channels):
            rest = split(row[c], kind)[1]
            for byte in range(low_bytes):
                low[c * low_bytes + byte] = rest >> 8 * byte & 255


@kernel
def decode_exponents(
    stored: Octets,
    offsets: Words,
    first_layer: int,
    last_layer: int,
    shape: Shape,
    kind: int,
    groups: int,
    rows: Bits,
) -> bool:
    """Fills layers first_layer ... last_layer - 1 of every row; False if `stored` is no such stream.

    stored: a multiple of 4 bytes, 4-aligned. Every length and place is checked before it is used.
    """
    _, planes, block_tokens, heads, dim = shape
    residuals = np.empty((len(rows) * block_tokens, heads * dim), np.int16)
    classes = np.full(heads * dim, _symbol_shift(kind) << 4, np.uint8)
    decoder = np.empty(SLOTS, np.uint32)
    for layer in range(first_layer, last_layer):
        at = np.int64(offsets[layer])
        for plane in range(planes):
            offset = (layer * planes + plane) * block_tokens * heads * dim
            at = _decode_plane(stored, at, groups, classes, decoder, residuals, rows, offset, block_tokens, heads, kind)
            if at < 0:
                return False
    return True


@kernel
def _decode_plane(
    stored: Octets,
    at: Any,
    groups: int,
    classes: Octets,
    decoder: Words,
    residuals: Residuals,
    rows: Bits,
    offset: int,
    block_tokens: int,
    heads: int,
    kind: int,
) -> Any:
    """Reads the plane at stored[at]; returns where it ends, or -1 if there is none. decoder, residuals: to work in."""
    tokens, channels = residuals.shape
    table_at, largest_at, place_at = _places(at, channels, groups)
    low_size = up(tokens * channels * _low_bytes(kind))
    if at % 4 or place_at + low_size > len(stored):
        return np.int64(-1)
    found = np.int64(stored[at : at + 4].view(np.uint32)[0])
    vector_at = place_at + 4 * found
    low_at = vector_at + up(found * channels // heads * rows.itemsize)
    if found > tokens * heads or low_at + low_size > len(stored):
        return np.int64(-1)
    if not _fill_decoder(stored[table_at:largest_at].view(np.uint16), decoder):
        return np.int64(-1)
    end = np.int64(read_streams(stored, at + 4, low_at + low_size, groups, classes, decoder, residuals))
    if end < 0:
        return end
    _restore(residuals, stored[largest_at:], stored[low_at:], kind, rows, offset, block_tokens)
    if not read_vectors(stored, place_at, vector_at, rows, offset, block_tokens, heads, channels // heads):
        return np.int64(-1)
    return end


@kernel
def _fill_decoder(frequencies: npt.NDArray[np.uint16], decoder: Words) -> bool:
    """Makes what `decode_stream` takes of one table, uint32 [SLOTS]; False if these are no frequencies."""
    slot = np.int64(0)
    for s in range(SYMBOLS):
        frequency = np.int64(frequencies[s])
        if frequency < 1 or slot + frequency > SLOTS:
            return False
        for i in range(frequency):
            decoder[slot + i] = np.uint32(s << 22 | frequency << 11 | i)
        slot += frequency
    return bool(slot == SLOTS)


@kernel
def _restore(
    residuals: Residuals, largest: Octets, lows: Octets, kind: int, rows: Bits, offset: int, block_tokens: int
) -> None:
    """Puts exponents and what was stored beside them together, in every row."""
    (tokens, channels), low_bytes, shift = residuals.shape, _low_bytes(kind), _symbol_shift(kind)
    for t in range(tokens):
        place = offset + t % block_tokens * channels
        target = rows[t // block_tokens, place : place + channels]
        low = lows[t * channels * low_bytes :]
        for c in range(channels):
            residual = np.int64(residuals[t, c])
            rest = np.int64(low[c * low_bytes])
            if kind == FLOAT32:
                rest |= np.int64(low[c * 3 + 1]) << 8 | np.int64(low[c * 3 + 2]) << 16
            if kind == FLOAT16:
                rest |= (residual & ((1 << _HALF_LOW) - 1)) << 8
            exponent = np.int64(largest[c]) - (residual >> shift) - HALF
            target[c] = join(exponent & 255, rest, kind)
