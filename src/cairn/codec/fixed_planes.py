"""The fixed-rate codecs' kernels: groups of 32 elements that share a scale and, for whole numbers, a zero point.

value = (code + zero) * scale, or fp8(code) * scale: one product, so that every machine decodes the same bits. K is
grouped along tokens, channel by channel, since its channels differ; V (and an MLA latent) along channels, token by
token, since its tokens do (KIVI: Liu et al., arXiv 2402.02750). A group with a value that is not finite becomes NaN.

A plane is scales u16 [groups] (bfloat16), zeros i16 [groups] (not for fp8), codes [tokens, bytes a token]; every size
follows from the number of tokens. Codes of 4 bits: the even channel in the low half.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cairn.codec.floats import BFLOAT16, E4M3, E4M3_MAX, Bits, bounded, narrow, to_e4m3, widen
from cairn.codec.planes import load_plane
from cairn.jit import kernel

GROUP: Final = 32
_MOST_ZERO: Final = 32000
_NAN: Final = 0x7FC0


@kernel
def groups_of(tokens: int, channels: int, along_tokens: bool) -> Any:
    """How many groups a plane has."""
    if along_tokens:
        return (tokens + GROUP - 1) // GROUP * channels
    return tokens * ((channels + GROUP - 1) // GROUP)


@kernel
def plane_bytes(tokens: int, channels: int, along_tokens: bool, bits: int, floating: bool) -> Any:
    """The size of a stored plane."""
    return (2 if floating else 4) * groups_of(tokens, channels, along_tokens) + tokens * ((channels * bits + 7) // 8)


@kernel
def _scale(low: Any, high: Any, bits: int, floating: bool) -> Any:
    """A group's scale as bfloat16 bits, never too small for its values."""
    largest = max(abs(low), abs(high))
    if not np.isfinite(largest) or not np.isfinite(high - low):
        return np.int64(_NAN)
    wanted = largest / E4M3_MAX if floating else max((high - low) / ((1 << bits) - 1), largest / _MOST_ZERO)
    code = narrow(np.float32(max(wanted, 1e-30)), BFLOAT16)
    return code if widen(code, BFLOAT16) >= wanted else code + 1


@kernel
def _range(part: Any) -> Any:
    """(smallest, largest) of a group; NaN if one of them is, 0 if there are none."""
    low, high = np.float32(0), np.float32(0)
    for i in range(part.shape[0]):
        for j in range(part.shape[1]):
            value = part[i, j]
            if np.isnan(value):
                return value, value
            if i == 0 and j == 0:
                low, high = value, value
            low, high = min(low, value), max(high, value)
    return low, high


@kernel
def encode_fixed(
    rows: Bits,
    shape: tuple[int, int, int, int, int],
    kind: int,
    bits: int,
    floating: bool,
    sinks: int,
    out: npt.NDArray[np.uint8],
    begin: int,
) -> None:
    """Writes every plane from out[begin] on, which must have room. The first `sinks` tokens count for nothing."""
    layers, planes, block_tokens, heads, dim = shape
    tokens, channels = len(rows) * block_tokens, heads * dim
    out16 = out.view(np.uint16)
    values = np.empty((tokens, channels), np.float32)
    at = begin
    for layer in range(layers):
        for plane in range(planes):
            along_tokens = planes == 2 and plane == 0
            load_plane(rows, (layer * planes + plane) * block_tokens * channels, block_tokens, kind, values)
            groups = groups_of(tokens, channels, along_tokens)
            row_bytes = (channels * bits + 7) // 8
            code_at = at + (2 if floating else 4) * groups
            codes = out[code_at : code_at + tokens * row_bytes].reshape(tokens, row_bytes)
            codes[:] = 0
            across = channels if along_tokens else (channels + GROUP - 1) // GROUP
            for group in range(groups):
                row, column = group // across, group % across
                if along_tokens:
                    part = values[row * GROUP : (row + 1) * GROUP, column : column + 1]
                    t0, c0 = row * GROUP, column
                else:
                    part = values[row : row + 1, column * GROUP : (column + 1) * GROUP]
                    t0, c0 = row, column * GROUP
                begin_token = min(max(sinks - t0, 0), part.shape[0])
                low, high = _range(part[begin_token:])
                scale_code = _scale(low, high, bits, floating)
                scale = widen(scale_code, BFLOAT16)
                zero = np.int64(0)
                if scale_code != _NAN and not floating:
                    zero = np.int64(np.rint(low / scale))
                out16[at // 2 + group] = scale_code
                if not floating:
                    out16[at // 2 + groups + group] = np.uint16(zero & 0xFFFF)
                if scale_code == _NAN:
                    continue
                for i in range(begin_token, part.shape[0]):
                    for j in range(part.shape[1]):
                        t, c = t0 + i, c0 + j
                        if floating:
                            code = to_e4m3(part[i, j] / scale)
                        else:
                            code = min(max(np.int64(np.rint(part[i, j] / scale)) - zero, 0), (1 << bits) - 1)
                        if bits == 4:
                            codes[t, c // 2] |= np.uint8(code << 4 * (c % 2))
                        else:
                            codes[t, c] = np.uint8(code)
            at += plane_bytes(tokens, channels, along_tokens, bits, floating)
            at += at % 2


@kernel
def decode_fixed(
    stored: npt.NDArray[np.uint8],
    begin: int,
    first_layer: int,
    last_layer: int,
    shape: tuple[int, int, int, int, int],
    kind: int,
    bits: int,
    floating: bool,
    rows: Bits,
) -> None:
    """Fills these layers of every row; `stored` has the length that the shape asks for."""
    _, planes, block_tokens, heads, dim = shape
    tokens, channels = len(rows) * block_tokens, heads * dim
    stored16 = stored.view(np.uint16)
    at = np.int64(begin)
    for layer in range(last_layer):
        for plane in range(planes):
            along_tokens = planes == 2 and plane == 0
            groups = groups_of(tokens, channels, along_tokens)
            row_bytes = (channels * bits + 7) // 8
            across = channels if along_tokens else (channels + GROUP - 1) // GROUP
            offset = (layer * planes + plane) * block_tokens * channels
            if layer >= first_layer:
                for t in range(tokens):
                    code_at = at + (2 if floating else 4) * groups + t * row_bytes
                    target = rows[t // block_tokens]
                    place = offset + t % block_tokens * channels
                    for c in range(channels):
                        group = t // GROUP * across + c if along_tokens else t * across + c // GROUP
                        scale = widen(stored16[at // 2 + group], BFLOAT16)
                        code = stored[code_at + c] if bits == 8 else stored[code_at + c // 2] >> 4 * (c % 2) & 15
                        if floating:
                            value = E4M3[code] * scale
                        else:
                            zero = np.int16(stored16[at // 2 + groups + group])
                            value = np.float32(np.int32(code) + np.int32(zero)) * scale
                        target[place + c] = narrow(bounded(value, kind), kind)
            at += plane_bytes(tokens, channels, along_tokens, bits, floating)
            at += at % 2
