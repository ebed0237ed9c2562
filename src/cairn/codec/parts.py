"""What a stream of planes is made of, whatever its codec: streams of words, and vectors that are kept as they are.

A plane's words stand at its end. Before them are, where its codec puts them, `spans` u32 [streams], the words of each
stream, with `states` u32 [streams, 32] behind them; and `places` u32 [exact], token * heads + head, ascending, with the
vectors' elements [exact, dim] behind them. Parts are padded to 4 bytes; all little-endian.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cairn.codec.floats import Bits
from cairn.codec.rans import LANES, Residuals, decode_stream, encode_stream
from cairn.jit import kernel

#: Symbols that a lane should have, so that its state of 32 bits does not count.
_LANE_SYMBOLS: Final = 1024

Octets = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
#: Layers, planes, block tokens, heads, dim: `KVGeometry.block_shape`.
Shape = tuple[int, int, int, int, int]


def groups_a_stream(tokens: int, channels: int) -> int:
    """How many groups of 32 channels share the lanes of a stream."""
    groups = -(-channels // LANES)
    return min(groups, max(1, -(-_LANE_SYMBOLS // tokens)), 255)


@kernel
def up(size: Any) -> Any:
    """The next multiple of 4."""
    return (size + 3) // 4 * 4


@kernel
def streams_of(channels: int, groups: int) -> Any:
    """How many streams a plane has."""
    return ((channels + LANES - 1) // LANES + groups - 1) // groups


@kernel
def spans_bytes(channels: int, groups: int) -> Any:
    """The size of a plane's spans and states."""
    return 4 * streams_of(channels, groups) * (1 + LANES)


@kernel
def write_streams(
    residuals: Residuals,
    groups: int,
    classes: Octets,
    encoder: Words,
    words: npt.NDArray[np.uint16],
    out: Octets,
    span_at: int,
    word_at: int,
) -> Any:
    """Codes a plane; returns where it ends, or -1 where `out` has no room. words: for one stream to be made in."""
    channels = residuals.shape[1]
    total, streams = (channels + LANES - 1) // LANES, streams_of(channels, groups)
    spans, states = out[span_at:].view(np.uint32), np.empty(LANES, np.uint32)
    out16, at = out.view(np.uint16), word_at // 2
    for stream in range(streams):
        first = stream * groups
        count = encode_stream(residuals, first, min(groups, total - first), classes, encoder, words, states)
        if at + count > len(out16):
            return -1
        spans[stream] = count
        for lane in range(LANES):
            spans[streams + stream * LANES + lane] = states[lane]
        for i in range(count):
            out16[at + i] = words[i]
        at += count
    if at % 2:
        if at >= len(out16):
            return -1
        out16[at] = 0
    return up(2 * at)


@kernel
def read_streams(
    stored: Octets,
    span_at: int,
    word_at: int,
    groups: int,
    classes: Octets,
    decoder: Words,
    residuals: Residuals,
) -> Any:
    """Decodes a plane whose spans are within `stored`; returns where it ends, or -1 if it is none. classes: sound."""
    channels = residuals.shape[1]
    total, streams = (channels + LANES - 1) // LANES, streams_of(channels, groups)
    spans, states = stored[span_at:].view(np.uint32), np.empty(LANES, np.uint32)
    stored16 = stored.view(np.uint16)
    at: Any = np.int64(word_at // 2)
    for stream in range(streams):
        first = stream * groups
        end: Any = at + np.int64(spans[stream])
        if end > len(stored16):
            return -1
        for lane in range(LANES):
            states[lane] = spans[streams + stream * LANES + lane]
        some = min(groups, total - first)
        if not decode_stream(stored16, at, end, states, first, some, classes, decoder, residuals):
            return -1
        at = end
    return up(2 * at)


@kernel
def write_vectors(
    rows: Bits, offset: int, block_tokens: int, exact: Octets, dim: int, out: Octets, place_at: int, vector_at: int
) -> None:
    """Writes the vectors that exact [tokens, heads] names, of the plane that begins at element `offset` of each row."""
    tokens, heads = exact.shape
    places, size, i = out[place_at:vector_at].view(np.uint32), rows.itemsize, 0
    for t in range(tokens):
        for h in range(heads):
            if exact[t, h]:
                places[i] = t * heads + h
                source = offset + (t % block_tokens * heads + h) * dim
                for d in range(dim):
                    bits = np.int64(rows[t // block_tokens, source + d])
                    for byte in range(size):
                        out[vector_at + (i * dim + d) * size + byte] = bits >> 8 * byte & 255
                i += 1


@kernel
def read_vectors(
    stored: Octets, place_at: int, vector_at: int, rows: Bits, offset: int, block_tokens: int, heads: int, dim: int
) -> bool:
    """Puts a plane's exact vectors, which are within `stored`, into their places; False if there are no such places."""
    places, size = stored[place_at:vector_at].view(np.uint32), rows.itemsize
    for i in range(len(places)):
        place: Any = np.int64(places[i])
        if place >= len(rows) * block_tokens * heads:
            return False
        t, h = place // heads, place % heads
        target = offset + (t % block_tokens * heads + h) * dim
        for d in range(dim):
            bits: Any = np.int64(0)
            for byte in range(size):
                bits |= np.int64(stored[vector_at + (i * dim + d) * size + byte]) << 8 * byte
            rows[t // block_tokens, target + d] = bits
    return True
