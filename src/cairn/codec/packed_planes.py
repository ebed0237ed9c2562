"""The bytes of a `packed` plane, and its kernels. Parts padded to 4 bytes, little-endian:

    strays      u32: how many elements' exponents are out of their channel's window
    top         u8 [channels]: the largest exponent of a channel's window
    codes       u8 [ceil(tokens / 8), 3, channels]: of 8 tokens, how far each exponent is below the top: 0 ... 6, 7 for
                those out of the window. Two bits of four tokens, two of the others, and the third bit of all
    high        as codes, of float16 only: the 3 bits of sign and mantissa above the low 8
    low         u8 [tokens, bytes, channels]: the low bytes of sign and mantissa
    exponents   u8 [strays]: theirs, in order

Every loop runs along the channels of one token and does the same for each, so that compilers use vectors.
"""

from typing import Any, Final

import numpy as np

from cairn.codec.floats import FLOAT16, FLOAT32, Bits, join, split
from cairn.codec.parts import Octets, Shape, Words, up
from cairn.jit import kernel

#: Tokens whose codes share bytes.
_GROUP: Final = 8
#: Exponents that a window holds; also the code of those out of it.
_WINDOW: Final = 7
#: Tokens that a window is chosen by.
_SAMPLE: Final = 16
#: The lowest bit of each of 8 codes.
_ONES: Final = np.uint64(0x0101010101010101)


@kernel
def encode_packed(rows: Bits, shape: Shape, kind: int, groups: int, begin: int, out: Octets, offsets: Words) -> int:
    """As `encode_exponents`; groups: nothing."""
    layers, planes, block_tokens, heads, dim = shape
    at = begin
    for layer in range(layers):
        offsets[layer] = at
        for plane in range(planes):
            offset = (layer * planes + plane) * block_tokens * heads * dim
            at = _encode_plane(rows, offset, block_tokens, heads * dim, kind, out, at)
            if at < 0:
                return -1
    return at


@kernel
def _parts(at: Any, tokens: int, channels: int, kind: int) -> Any:
    """Where top, codes, high, low and exponents of the plane at `at` are."""
    code_bytes = (tokens + _GROUP - 1) // _GROUP * 3 * channels
    top_at = at + 4
    code_at = top_at + up(channels)
    high_at = code_at + up(code_bytes)
    low_at = high_at + (up(code_bytes) if kind == FLOAT16 else 0)
    return top_at, code_at, high_at, low_at, low_at + up(tokens * channels * _low_bytes(kind))


@kernel
def _low_bytes(kind: int) -> Any:
    return 3 if kind == FLOAT32 else 1


@kernel
def _encode_plane(rows: Bits, offset: int, block_tokens: int, channels: int, kind: int, out: Octets, at: int) -> Any:
    """Writes one plane at out[at]; returns where it ends, or -1."""
    tokens, low_bytes = len(rows) * block_tokens, _low_bytes(kind)
    top_at, code_at, high_at, low_at, stray_at = _parts(at, tokens, channels, kind)
    if stray_at > len(out):
        return -1
    out[at:low_at] = 0
    out[stray_at - 4 : stray_at] = 0
    top = out[top_at : top_at + channels]
    _choose_window(rows, offset, block_tokens, kind, top)
    padded, exponents = np.zeros((channels + 7) // 8 * 8, np.uint8), np.empty(channels, np.uint8)
    codes, rests, strays = padded[:channels], np.empty(channels, np.uint32), np.int64(0)
    for t in range(tokens):
        place = offset + t % block_tokens * channels
        row = rows[t // block_tokens, place : place + channels]
        outside = _split_row(row, kind, top, exponents, codes, rests)
        group = t // _GROUP * 3 * channels
        _pack(codes, t % _GROUP, out[code_at + group : code_at + group + 3 * channels])
        if stray_at + strays + outside > len(out):
            return -1
        strays += _note_strays(padded, exponents, out[stray_at + strays :])
        _write_low(rests, low_bytes, out[low_at + t * low_bytes * channels :])
        if kind == FLOAT16:
            for c in range(channels):
                codes[c] = rests[c] >> np.uint32(8)
            _pack(codes, t % _GROUP, out[high_at + group : high_at + group + 3 * channels])
    out[at : at + 4].view(np.uint32)[0] = strays
    end = stray_at + up(strays)
    if end > len(out):
        return -1
    out[stray_at + strays : end] = 0
    return end


@kernel
def _write_low(rests: Words, low_bytes: int, out: Octets) -> None:
    channels = len(rests)
    for byte in range(low_bytes):
        part = out[byte * channels : (byte + 1) * channels]
        for c in range(channels):
            part[c] = rests[c] >> np.uint32(8 * byte)


@kernel
def _choose_window(rows: Bits, offset: int, block_tokens: int, kind: int, top: Octets) -> None:
    """The window of each channel that holds most exponents of a sample of tokens."""
    tokens, channels = len(rows) * block_tokens, len(top)
    some = min(tokens, _SAMPLE)
    seen = np.empty(some, np.uint8)
    for c in range(channels):
        for i in range(some):
            t = i * tokens // some
            seen[i] = split(rows[t // block_tokens, offset + t % block_tokens * channels + c], kind)[0]
        best = -1
        for i in range(some):
            inside: Any = 0
            for j in range(some):
                below = np.int64(seen[i]) - np.int64(seen[j])
                inside += below >= 0 and below < _WINDOW
            if inside > best:
                best = inside
                top[c] = seen[i]


@kernel
def _split_row(row: Bits, kind: int, top: Octets, exponents: Octets, codes: Octets, rests: Words) -> Any:
    """Takes a token's elements apart; returns how many are out of their windows."""
    outside = np.int64(0)
    for c in range(len(row)):
        exponent, rest = split(row[c], kind)
        below = (np.int64(top[c]) - exponent) & 255
        code = min(below, _WINDOW)
        exponents[c] = exponent
        codes[c] = code
        rests[c] = rest
        outside += code == _WINDOW
    return outside


@kernel
def _pack(codes: Octets, place: int, out: Octets) -> None:
    """Adds the codes of a token, which is the `place`th of its group, to the group's bytes."""
    channels = len(codes)
    pairs = out[place // 4 * channels : (place // 4 + 1) * channels]
    thirds = out[2 * channels : 3 * channels]
    left, one = place % 4 * 2, place
    for c in range(channels):
        pairs[c] |= (codes[c] & 3) << left
        thirds[c] |= (codes[c] >> 2) << one


@kernel
def _unpack(packed: Octets, place: int, codes: Octets) -> None:
    """The inverse of `_pack`."""
    channels = len(codes)
    pairs = packed[place // 4 * channels : (place // 4 + 1) * channels]
    thirds = packed[2 * channels : 3 * channels]
    left, one = place % 4 * 2, place
    for c in range(channels):
        codes[c] = (pairs[c] >> left & 3) | (thirds[c] >> one & 1) << 2


@kernel
def _any_stray(word: Any) -> Any:
    """Of 8 codes at once: whether one of them is out of its window, all three bits set."""
    return (word & word >> np.uint64(1) & word >> np.uint64(2)) & _ONES


@kernel
def _note_strays(padded: Octets, exponents: Octets, out: Octets) -> Any:
    """Writes down the exponents of a token that are out of their windows; returns how many. padded: codes."""
    count, words = np.int64(0), padded.view(np.uint64)
    for i in range(len(words)):
        if _any_stray(words[i]):
            for c in range(8 * i, 8 * i + 8):
                if padded[c] == _WINDOW:
                    out[count] = exponents[c]
                    count += 1
    return count


@kernel
def _place_strays(padded: Octets, exponents: Octets, kind: int, row: Bits) -> Any:
    """Puts exponents into a token's elements that are out of their windows; returns how many there are, or -1 if these
    are more than `exponents`."""
    count, words = np.int64(0), padded.view(np.uint64)
    for i in range(len(words)):
        if _any_stray(words[i]):
            for c in range(8 * i, 8 * i + 8):
                if padded[c] == _WINDOW:
                    if count == len(exponents):
                        return np.int64(-1)
                    row[c] = join(np.int64(exponents[count]), split(row[c], kind)[1], kind)
                    count += 1
    return count


@kernel
def decode_packed(
    stored: Octets,
    offsets: Words,
    first_layer: int,
    last_layer: int,
    shape: Shape,
    kind: int,
    groups: int,
    rows: Bits,
) -> bool:
    """As `decode_exponents`; groups: nothing."""
    _, planes, block_tokens, heads, dim = shape
    for layer in range(first_layer, last_layer):
        at = np.int64(offsets[layer])
        for plane in range(planes):
            offset = (layer * planes + plane) * block_tokens * heads * dim
            at = _decode_plane(stored, at, rows, offset, block_tokens, heads * dim, kind)
            if at < 0:
                return False
    return True


@kernel
def _decode_plane(stored: Octets, at: Any, rows: Bits, offset: int, block_tokens: int, channels: int, kind: int) -> Any:
    """Reads the plane at stored[at]; returns where it ends, or -1 if there is none."""
    tokens, low_bytes = len(rows) * block_tokens, _low_bytes(kind)
    top_at, code_at, high_at, low_at, stray_at = _parts(at, tokens, channels, kind)
    if at % 4 or stray_at > len(stored):
        return np.int64(-1)
    strays = np.int64(stored[at : at + 4].view(np.uint32)[0])
    end = stray_at + strays
    if end > len(stored):
        return np.int64(-1)
    top, highs = stored[top_at : top_at + channels], np.zeros(channels, np.uint8)
    padded = np.zeros((channels + 7) // 8 * 8, np.uint8)
    codes = padded[:channels]
    for t in range(tokens):
        group = t // _GROUP * 3 * channels
        _unpack(stored[code_at + group : code_at + group + 3 * channels], t % _GROUP, codes)
        if kind == FLOAT16:
            _unpack(stored[high_at + group : high_at + group + 3 * channels], t % _GROUP, highs)
        low = stored[low_at + t * low_bytes * channels : low_at + (t + 1) * low_bytes * channels]
        place = offset + t % block_tokens * channels
        target = rows[t // block_tokens, place : place + channels]
        _join_row(top, codes, highs, low, kind, target)
        placed = _place_strays(padded, stored[stray_at:end], kind, target)
        if placed < 0:
            return np.int64(-1)
        stray_at += placed
    return up(end) if stray_at == end else np.int64(-1)


@kernel
def _join_row(top: Octets, codes: Octets, highs: Octets, low: Octets, kind: int, target: Bits) -> None:
    """Puts a token's elements together."""
    channels = len(top)
    if kind == FLOAT32:
        middle, upper = low[channels : 2 * channels], low[2 * channels : 3 * channels]
        for c in range(channels):
            rest = np.int64(low[c]) | np.int64(middle[c]) << 8 | np.int64(upper[c]) << 16
            target[c] = join((np.int64(top[c]) - np.int64(codes[c])) & 255, rest, kind)
    elif kind == FLOAT16:
        for c in range(channels):
            rest = np.int64(low[c]) | np.int64(highs[c]) << 8
            target[c] = join((np.int64(top[c]) - np.int64(codes[c])) & 31, rest, kind)
    else:
        for c in range(channels):
            target[c] = join((np.int64(top[c]) - np.int64(codes[c])) & 255, np.int64(low[c]), kind)
