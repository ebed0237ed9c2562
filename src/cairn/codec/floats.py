"""Numbers of the KV cache as bits, for kernels: the same on every machine, rounded to nearest even.

A kernel sees elements as unsigned integers and a kind: 0 bfloat16, 1 float16 (both uint16), 2 float32 (uint32).
"""

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cairn.codec.base import Octets
from cairn.errors import GeometryError
from cairn.jit import kernel
from cairn.kv import KVGeometry

KINDS: Final = {"bfloat16": 0, "float16": 1, "float32": 2}
BFLOAT16, FLOAT16, FLOAT32 = KINDS.values()
FLOAT16_MAX: Final = 65504.0

#: Bits of elements: uint16 or uint32.
Bits = npt.NDArray[Any]
E4M3_MAX: Final = 448.0


def _e4m3(code: int) -> float:
    exponent, fraction = code >> 3 & 15, code & 7
    size = math.ldexp(fraction, -9) if exponent == 0 else math.ldexp(8 + fraction, exponent - 10)
    return math.copysign(math.nan if code & 127 == 127 else size, -1 if code & 128 else 1)


#: The values of float8 e4m3fn (Micikevicius et al., arXiv 2209.05433), float32 [256].
E4M3: Final = np.array([_e4m3(code) for code in range(256)], np.float32)


def kind_of(geometry: KVGeometry, setting: str = "compression.algorithm") -> int:
    """The kind of a geometry's elements. Raises GeometryError, naming the setting, for those that are quantized
    already.
    """
    if geometry.dtype not in KINDS:
        raise GeometryError(f"dtype={geometry.dtype}: only {', '.join(KINDS)} can be compressed; set {setting} to none")
    return KINDS[geometry.dtype]


def bits_of(rows: Octets, kind: int) -> Bits:
    """Rows of bytes as rows of elements: a view."""
    return rows.view(np.uint32 if kind == FLOAT32 else np.uint16)


@kernel
def widen(bits: Any, kind: int) -> Any:
    """The value of an element, float32."""
    if kind == BFLOAT16:
        return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    if kind == FLOAT32:
        return np.uint32(bits).view(np.float32)
    sign = np.uint32((bits & 0x8000) << 16)
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    if exponent == 31:
        return np.uint32(sign | np.uint32(0x7F800000 | fraction << 13)).view(np.float32)
    if exponent == 0:
        value = np.float32(fraction) * np.float32(2.0**-24)
        return -value if sign else value
    return np.uint32(sign | np.uint32((exponent + 112) << 23 | fraction << 13)).view(np.float32)


@kernel
def narrow(value: Any, kind: int) -> Any:
    """The bits of the element nearest to a float32. NaN stays a NaN."""
    bits = np.int64(np.float32(value).view(np.uint32))
    if kind == FLOAT32:
        return bits
    magnitude = bits & 0x7FFFFFFF
    if kind == BFLOAT16:
        if magnitude > 0x7F800000:
            return (bits >> 16) | 0x40
        return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    sign = bits >> 16 & 0x8000
    if magnitude >= 0x47800000:  # beyond float16, infinite, or NaN
        return sign | (0x7E00 if magnitude > 0x7F800000 else 0x7C00)
    if magnitude < 0x38800000:  # subnormal in float16
        scaled = np.float32(abs(value)) * np.float32(2.0**24)
        return sign | np.int64(np.rint(scaled))
    return sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13)


@kernel
def bounded(value: Any, kind: int) -> Any:
    """A float32 that rounding has taken beyond the largest element of its kind, as that one. NaN stays."""
    if kind == FLOAT16 and abs(value) > FLOAT16_MAX:
        return np.float32(FLOAT16_MAX) if value > 0 else np.float32(-FLOAT16_MAX)
    return value


@kernel
def to_e4m3(value: Any) -> Any:
    """The code of the e4m3 nearest to a float32 of at most 448, ties to even."""
    bits = np.float32(value).view(np.int32)
    # A binade's codes are an eighth of its begin apart, which is the last bit of 2^20 times as much; below the first
    # normal number they go on as in its binade.
    begin = max(np.int32(bits & np.int32(0x7F800000)), np.int32(121 << 23))
    far = np.int32(begin + np.int32(20 << 23))
    rounded = np.float32(abs(np.float32(value)) + far.view(np.float32)).view(np.int32)
    return np.int32((begin >> 20) - (121 << 3) + rounded - far | bits >> 24 & 128)


@kernel
def split(bits: Any, kind: int) -> Any:
    """(exponent, sign and mantissa) of an element."""
    bits = np.int64(bits)
    if kind == FLOAT32:
        return bits >> 23 & 255, (bits >> 31) << 23 | bits & 0x7FFFFF
    if kind == FLOAT16:
        return bits >> 10 & 31, (bits >> 15) << 10 | bits & 0x3FF
    return bits >> 7 & 255, (bits >> 15) << 7 | bits & 0x7F


@kernel
def join(exponent: Any, rest: Any, kind: int) -> Any:
    """The inverse of `split`."""
    if kind == FLOAT32:
        return (rest >> 23) << 31 | exponent << 23 | rest & 0x7FFFFF
    if kind == FLOAT16:
        return (rest >> 10) << 15 | exponent << 10 | rest & 0x3FF
    return (rest >> 7) << 15 | exponent << 7 | rest & 0x7F
