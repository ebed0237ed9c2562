"""The bytes of a `cachegen` stream, written and read by kernels: one section a plane, in the order of the block.

    header      u32: magic, tokens, groups a stream | first rotated dim << 8, pairs, length in bytes; u32 [layers] where
                each layer begins, in bytes; u32 [pairs] turns. Planes follow, every part padded to 4 bytes:
    exact       u32: how many vectors are exact
    spans       u32 [streams]: words of each stream
    states      u32 [streams, 32]
    codes       u8 [heads]: steps
    classes     u8 [channels]
    anchors     i16 [channels]
    places      u32 [exact]: token * heads + head, ascending
    vectors     [exact, dim] elements
    words       u16: the streams, one behind the other

Little-endian. A section can be read without those before it, so a layer can be decoded as soon as it is there.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cairn.codec.floats import Bits
from cairn.codec.planes import fit_plane, load_plane, restore_plane
from cairn.codec.rans import LANES, classes_are_sound, decode_stream, encode_stream
from cairn.jit import kernel

#: "CKV1".
MAGIC: Final = 0x31564B43
HEADER_WORDS: Final = 5
#: Symbols that a lane should have, so that its state of 32 bits does not count.
_LANE_SYMBOLS: Final = 1024

Words = npt.NDArray[np.uint32]


def groups_a_stream(tokens: int, channels: int) -> int:
    """How many groups of 32 channels share the lanes of a stream."""
    groups = -(-channels // LANES)
    return min(groups, max(1, -(-_LANE_SYMBOLS // tokens)), 255)


@kernel
def _up(size: Any) -> Any:
    return (size + 3) // 4 * 4


@kernel
def encode_planes(
    rows: Bits,
    shape: tuple[int, int, int, int, int],
    kind: int,
    groups: int,
    relative_steps: npt.NDArray[np.float32],
    sinks: int,
    sines: npt.NDArray[np.int16],
    first: int,
    tables: tuple[Any, Any, Any],
    begin: int,
    out: npt.NDArray[np.uint8],
    offsets: Words,
) -> int:
    """Writes every plane from out[begin] on; returns where it ends, or -1 where `out` has no room.

    relative_steps: float32 [layers, planes]. sinks: leading tokens to keep exact. offsets: uint32 [layers], filled.
    """
    layers, planes, block_tokens, heads, dim = shape
    edges, all_classes, encoder = tables
    tokens, channels = len(rows) * block_tokens, heads * dim
    streams = ((channels + LANES - 1) // LANES + groups - 1) // groups
    out16, out32 = out.view(np.uint16), out.view(np.uint32)
    values = np.empty((tokens, channels), np.float32)
    residuals = np.empty((tokens, channels), np.int16)
    words = np.empty(tokens * groups * LANES, np.uint16)
    codes, anchors = np.empty(heads, np.uint8), np.empty(channels, np.int16)
    classes, states = np.empty(channels, np.uint8), np.empty(LANES, np.uint32)
    exact = np.empty((tokens, heads), np.uint8)
    element = 2 if kind == 2 else 1  # in uint16
    at = begin
    for layer in range(layers):
        offsets[layer] = at
        for plane in range(planes):
            offset = (layer * planes + plane) * block_tokens * channels
            turning = sines if plane == 0 else sines[:, :, :0]
            load_plane(rows, offset, block_tokens, kind, values)
            exact[:] = 0
            exact[:sinks] = 1
            step = relative_steps[layer, plane]
            found = fit_plane(
                values, step, turning, first, edges, all_classes, exact, codes, anchors, classes, residuals
            )
            spans = at // 4 + 1
            code_at = at + 4 + 4 * streams * (1 + LANES)
            class_at = code_at + _up(heads)
            anchor_at = class_at + _up(channels)
            place_at = anchor_at + _up(2 * channels)
            vector_at = place_at + 4 * found
            word_at = vector_at + _up(2 * found * dim * element)
            if word_at > len(out):
                return -1
            out32[at // 4] = found
            out[code_at:word_at] = 0
            out[code_at : code_at + heads] = codes
            out[class_at : class_at + channels] = classes
            for c in range(channels):
                out16[anchor_at // 2 + c] = np.uint16(anchors[c])
            i = 0
            for t in range(tokens):
                for h in range(heads):
                    if exact[t, h]:
                        out32[place_at // 4 + i] = t * heads + h
                        source = offset + t % block_tokens * channels + h * dim
                        for d in range(dim):
                            bits = rows[t // block_tokens, source + d]
                            if element == 2:
                                out32[vector_at // 4 + i * dim + d] = bits
                            else:
                                out16[vector_at // 2 + i * dim + d] = np.uint16(bits)
                        i += 1
            total = (channels + LANES - 1) // LANES
            for stream in range(streams):
                count = encode_stream(
                    residuals,
                    stream * groups,
                    min(groups, total - stream * groups),
                    classes,
                    encoder,
                    words,
                    states,
                )
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
def decode_planes(
    stored: npt.NDArray[np.uint8],
    offsets: Words,
    first_layer: int,
    last_layer: int,
    shape: tuple[int, int, int, int, int],
    kind: int,
    groups: int,
    sines: npt.NDArray[np.int16],
    first: int,
    decoder: npt.NDArray[np.uint32],
    rows: Bits,
) -> bool:
    """Fills layers first_layer ... last_layer - 1 of every row; False if `stored` is no such stream.

    stored: a multiple of 4 bytes, 4-aligned. Every length and place is checked before it is used.
    """
    _, planes, block_tokens, heads, dim = shape
    tokens, channels = len(rows) * block_tokens, heads * dim
    total = (channels + LANES - 1) // LANES
    streams = (total + groups - 1) // groups
    size = len(stored)
    stored16, stored32 = stored.view(np.uint16), stored.view(np.uint32)
    residuals = np.empty((tokens, channels), np.int16)
    anchors, states = np.empty(channels, np.int16), np.empty(LANES, np.uint32)
    element = 2 if kind == 2 else 1
    fixed = 4 + 4 * streams * (1 + LANES) + _up(heads) + _up(channels) + _up(2 * channels)
    for layer in range(first_layer, last_layer):
        at = np.int64(offsets[layer])
        for plane in range(planes):
            if at % 4 or at + fixed > size:
                return False
            found = np.int64(stored32[at // 4])
            spans = at // 4 + 1
            code_at = at + 4 + 4 * streams * (1 + LANES)
            class_at = code_at + _up(heads)
            anchor_at = class_at + _up(channels)
            place_at = anchor_at + _up(2 * channels)
            vector_at = place_at + 4 * found
            word_at = vector_at + _up(2 * found * dim * element)
            if found > tokens * heads or word_at > size:
                return False
            codes = stored[code_at : code_at + heads]
            classes = stored[class_at : class_at + channels]
            if not classes_are_sound(classes):
                return False
            for c in range(channels):
                anchors[c] = np.int16(stored16[anchor_at // 2 + c])
            for stream in range(streams):
                count = np.int64(stored32[spans + stream])
                if word_at + 2 * count > size:
                    return False
                for lane in range(LANES):
                    states[lane] = stored32[spans + streams + stream * LANES + lane]
                begin = word_at // 2
                some = min(groups, total - stream * groups)
                if not decode_stream(
                    stored16, begin, begin + count, states, stream * groups, some, classes, decoder, residuals
                ):
                    return False
                word_at += 2 * count
            offset = (layer * planes + plane) * block_tokens * channels
            turning = sines if plane == 0 else sines[:, :, :0]
            restore_plane(residuals, codes, anchors, turning, first, rows, offset, block_tokens, kind)
            for i in range(found):
                place = np.int64(stored32[place_at // 4 + i])
                if place >= tokens * heads:
                    return False
                t, h = place // heads, place % heads
                target = offset + t % block_tokens * channels + h * dim
                for d in range(dim):
                    if element == 2:
                        rows[t // block_tokens, target + d] = stored32[vector_at // 4 + i * dim + d]
                    else:
                        rows[t // block_tokens, target + d] = stored16[vector_at // 2 + i * dim + d]
            at = _up(word_at)
    return True
