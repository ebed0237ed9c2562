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
from cairn.codec.planes import fit_plane, load_plane, restore_plane
from cairn.codec.rans import LANES, classes_are_sound
from cairn.jit import kernel

#: "CKV1".
MAGIC: Final = 0x31564B43
HEADER_WORDS: Final = 5

#: A plane's step, turning sines and first rotated dim.
_Plan = tuple[float, npt.NDArray[np.int16], int]


@kernel
def encode_planes(
    rows: Bits,
    shape: Shape,
    kind: int,
    groups: int,
    relative_steps: npt.NDArray[np.float32],
    sinks: int,
    sines: npt.NDArray[np.int16],
    first: int,
    tables: tuple[Any, Any, Any],
    begin: int,
    out: Octets,
    offsets: Words,
) -> int:
    """Writes every plane from out[begin] on; returns where it ends, or -1 where `out` has no room.

    relative_steps: float32 [layers, planes]. sinks: leading tokens to keep exact. offsets: uint32 [layers], filled.
    """
    layers, planes, block_tokens, heads, dim = shape
    tokens = len(rows) * block_tokens
    values = np.empty((tokens, heads * dim), np.float32)
    words = np.empty(tokens * groups * LANES, np.uint16)
    exact = np.empty((tokens, heads), np.uint8)
    at = begin
    for layer in range(layers):
        offsets[layer] = at
        for plane in range(planes):
            offset = (layer * planes + plane) * block_tokens * heads * dim
            load_plane(rows, offset, block_tokens, kind, values)
            exact[:] = 0
            exact[:sinks] = 1
            plan = relative_steps[layer, plane], sines if plane == 0 else sines[:, :, :0], first
            at = _encode_plane(values, plan, tables, exact, groups, words, rows, offset, block_tokens, out, at)
            if at < 0:
                return -1
    return at


@kernel
def _encode_plane(
    values: npt.NDArray[np.float32],
    plan: _Plan,
    tables: tuple[Any, Any, Any],
    exact: Octets,
    groups: int,
    words: npt.NDArray[np.uint16],
    rows: Bits,
    offset: int,
    block_tokens: int,
    out: Octets,
    at: int,
) -> Any:
    """Writes one plane at out[at]; returns where it ends, or -1."""
    tokens, channels = values.shape
    heads = exact.shape[1]
    step, sines, first = plan
    edges, all_classes, encoder = tables
    codes, anchors = np.empty(heads, np.uint8), np.empty(channels, np.int16)
    classes, residuals = np.empty(channels, np.uint8), np.empty((tokens, channels), np.int16)
    found = fit_plane(values, step, sines, first, edges, all_classes, exact, codes, anchors, classes, residuals)
    code_at, class_at, anchor_at, place_at = _places(at, heads, channels, groups)
    vector_at = place_at + 4 * found
    word_at = vector_at + up(found * channels // heads * rows.itemsize)
    if word_at > len(out):
        return -1
    out[at:word_at] = 0
    out[at : at + 4].view(np.uint32)[0] = found
    for h in range(heads):
        out[code_at + h] = codes[h]
    anchors_out = out[anchor_at : anchor_at + 2 * channels].view(np.int16)
    for c in range(channels):
        out[class_at + c] = classes[c]
        anchors_out[c] = anchors[c]
    write_vectors(rows, offset, block_tokens, exact, channels // heads, out, place_at, vector_at)
    return write_streams(residuals, groups, classes, encoder, words, out, at + 4, word_at)


@kernel
def _places(at: Any, heads: int, channels: int, groups: int) -> Any:
    """Where codes, classes, anchors and places of the plane at `at` are."""
    code_at = at + 4 + spans_bytes(channels, groups)
    class_at = code_at + up(heads)
    anchor_at = class_at + up(channels)
    return code_at, class_at, anchor_at, anchor_at + up(2 * channels)


@kernel
def decode_planes(
    stored: Octets,
    offsets: Words,
    first_layer: int,
    last_layer: int,
    shape: Shape,
    kind: int,
    groups: int,
    sines: npt.NDArray[np.int16],
    first: int,
    decoder: Words,
    rows: Bits,
) -> bool:
    """Fills layers first_layer ... last_layer - 1 of every row; False if `stored` is no such stream.

    stored: a multiple of 4 bytes, 4-aligned. Every length and place is checked before it is used.
    """
    _, planes, block_tokens, heads, dim = shape
    residuals = np.empty((len(rows) * block_tokens, heads * dim), np.int16)
    for layer in range(first_layer, last_layer):
        at = np.int64(offsets[layer])
        for plane in range(planes):
            offset = (layer * planes + plane) * block_tokens * heads * dim
            turning = sines if plane == 0 else sines[:, :, :0]
            at = _decode_plane(
                stored, at, turning, first, groups, decoder, residuals, rows, offset, block_tokens, heads, kind
            )
            if at < 0:
                return False
    return True


@kernel
def _parts(stored: Octets, at: Any, tokens: Any, heads: int, channels: Any, groups: int, itemsize: int) -> Any:
    """Where codes, classes, anchors, places, vectors and words of the plane at stored[at] are; words at -1: there is no
    such plane.
    """
    code_at, class_at, anchor_at, place_at = _places(at, heads, channels, groups)
    if at % 4 or place_at > len(stored):
        return code_at, class_at, anchor_at, place_at, place_at, np.int64(-1)
    found = np.int64(stored[at : at + 4].view(np.uint32)[0])
    vector_at = place_at + 4 * found
    word_at = vector_at + up(found * channels // heads * itemsize)
    sound = classes_are_sound(stored[class_at : class_at + channels])
    if found > tokens * heads or word_at > len(stored) or not sound:
        word_at = np.int64(-1)
    return code_at, class_at, anchor_at, place_at, vector_at, word_at


@kernel
def _decode_plane(
    stored: Octets,
    at: Any,
    sines: npt.NDArray[np.int16],
    first: int,
    groups: int,
    decoder: Words,
    residuals: npt.NDArray[np.int16],
    rows: Bits,
    offset: int,
    block_tokens: int,
    heads: int,
    kind: int,
) -> Any:
    """Reads the plane at stored[at]; returns where it ends, or -1 if there is none. residuals: to work in."""
    tokens, channels = residuals.shape
    code_at, class_at, anchor_at, place_at, vector_at, word_at = _parts(
        stored, at, tokens, heads, channels, groups, rows.itemsize
    )
    if word_at < 0:
        return np.int64(-1)
    classes = stored[class_at : class_at + channels]
    end = np.int64(read_streams(stored, at + 4, word_at, groups, classes, decoder, residuals))
    if end < 0:
        return end
    codes = stored[code_at : code_at + heads]
    anchors = stored[anchor_at : anchor_at + 2 * channels].view(np.int16)
    restore_plane(residuals, codes, anchors, sines, first, rows, offset, block_tokens, kind)
    if not read_vectors(stored, place_at, vector_at, rows, offset, block_tokens, heads, channels // heads):
        return np.int64(-1)
    return end


@kernel
def locate_planes(
    stored: Octets,
    offsets: Words,
    shape: Shape,
    tokens: int,
    groups: int,
    itemsize: int,
    spans: npt.NDArray[np.int64],
    states: npt.NDArray[np.uint32],
    codes: Octets,
    classes: Octets,
    anchors: npt.NDArray[np.int16],
    vectors: npt.NDArray[np.int64],
) -> bool:
    """What a decoder of all planes at once needs, taken from `stored`; False if it is no such stream.

    Filled: spans int64 [planes, streams, 2], the word at which each stream begins, and that behind it; states uint32
    [planes, streams, 32]; codes [planes, heads], classes, anchors [planes, channels]; vectors int64 [planes, 2],
    where places and vectors of the exact ones begin. Planes of layer after layer.
    """
    layers, planes, _, heads, dim = shape
    channels, streams = heads * dim, states.shape[1]
    for layer in range(layers):
        at = np.int64(offsets[layer])
        for plane in range(planes):
            p = layer * planes + plane
            code_at, class_at, anchor_at, place_at, vector_at, word_at = _parts(
                stored, at, tokens, heads, channels, groups, itemsize
            )
            if word_at < 0:
                return False
            codes[p] = stored[code_at : code_at + heads]
            classes[p] = stored[class_at : class_at + channels]
            anchors[p] = stored[anchor_at : anchor_at + 2 * channels].view(np.int16)
            vectors[p, 0], vectors[p, 1] = place_at, vector_at
            head = stored[at + 4 : code_at].view(np.uint32)
            word = np.int64(word_at // 2)
            for stream in range(streams):
                spans[p, stream, 0] = word
                word += np.int64(head[stream])
                spans[p, stream, 1] = word
                states[p, stream] = head[streams + stream * LANES : streams + (stream + 1) * LANES]
            at = up(2 * word)
            if at > len(stored):
                return False
    return True


@kernel
def patch_planes(stored: Octets, vectors: npt.NDArray[np.int64], shape: Shape, rows: Bits) -> bool:
    """Puts the exact vectors that `locate_planes` has found into every plane of `rows`; False if they have no place."""
    _, _, block_tokens, heads, dim = shape
    for p in range(len(vectors)):
        offset = p * block_tokens * heads * dim
        if not read_vectors(stored, vectors[p, 0], vectors[p, 1], rows, offset, block_tokens, heads, dim):
            return False
    return True
