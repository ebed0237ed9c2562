"""Groups of quantized rows in Triton, whose bits are those of `codec.quantized`: values to heads and codes, and back.

UNIT 0: codes are e4m3, and there are no zero points.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from cairn.codec import floats
from cairn.codec.quantized import MOST_ZERO, NAN_SCALE, NANS, SCALE_OFFSET

_BFLOAT16, _FLOAT16, FLOAT32 = tl.constexpr(floats.BFLOAT16), tl.constexpr(floats.FLOAT16), tl.constexpr(floats.FLOAT32)
_NANS = tl.constexpr(NANS)
_INFINITY = tl.constexpr(0x7F800000)
_SCALE_OFFSET, _NAN_SCALE = tl.constexpr(SCALE_OFFSET), tl.constexpr(NAN_SCALE)
_MOST_ZERO, _FLOAT16_MAX = tl.constexpr(float(MOST_ZERO)), tl.constexpr(floats.FLOAT16_MAX)
_E4M3_MAX = tl.constexpr(floats.E4M3_MAX)
#: Added to and taken from a float32 it rounds to nearest even, as long as nobody fuses it with what comes before.
_ROUND = tl.constexpr(12582912.0)


# Not tl.max: that is a kernel too, which only runs interpreted if triton was first imported so.
@triton.jit
def _wider(low, high, other_low, other_high):
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def most(one, other):
    return tl.maximum(one, other)


@triton.jit
def _ordered(bits):
    """int32 bits of floats as numbers ordered as their values are, and the way back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key(values, UNIT: tl.constexpr):
    """int32, ordered as the values are; as their magnitudes are, where no more is asked for."""
    bits = values.to(tl.int32, bitcast=True)
    if UNIT == 0:
        found = bits & 0x7FFFFFFF
    else:
        found = _ordered(bits)
    return found


@triton.jit
def ends(low_key, high_key, AXIS: tl.constexpr, UNIT: tl.constexpr):
    """The keys of groups' ends, from those of their parts; of magnitudes only the upper one counts."""
    if UNIT == 0:
        high = tl.reduce(high_key, AXIS, most)
        low = high
    else:
        low, high = tl.reduce((low_key, high_key), AXIS, _wider)
    return low, high


@triton.jit
def head(low_key, high_key, BITS: tl.constexpr, UNIT: tl.constexpr):
    """(head, 1 / scale, UNIT * zero) of groups, from the keys of their ends."""
    low, high = _ordered(low_key).to(tl.float32, bitcast=True), _ordered(high_key).to(tl.float32, bitcast=True)
    largest = tl.maximum(tl.abs(low), tl.abs(high))
    if UNIT == 0:
        wanted = largest * (1 / _E4M3_MAX)
    else:
        wanted = tl.maximum((high - low) * (1 / ((1 << BITS) - UNIT)), largest * (1 / (_MOST_ZERO * UNIT)))
    code = ((wanted.to(tl.uint32, bitcast=True) + 0xFFFFF) >> 20).to(tl.int32) - _SCALE_OFFSET
    bad = (high_key >= _INFINITY) | (low_key < -_INFINITY) | (code >= _NAN_SCALE)
    code = tl.where(bad, _NAN_SCALE, tl.maximum(code, 0))
    scale = ((code + _SCALE_OFFSET) << 20).to(tl.float32, bitcast=True)
    inverse = tl.where(bad, 0.0, tl.div_rn(tl.full(low.shape, 1.0, tl.float32), scale))
    zero = tl.full(low.shape, 0.0, tl.float32)
    if UNIT != 0:
        zero = tl.where(bad, 0.0, ((low * inverse - (UNIT - 1) / 2) * (1 / UNIT) + _ROUND) - _ROUND)
    return code | ((zero.to(tl.int32) & 255) << 8), inverse, zero * UNIT


@triton.jit
def scale(head, UNIT: tl.constexpr):
    """(scale, UNIT * zero) of heads; NaN where a group comes back as NaN. That of e4m3 is for `value`."""
    code = head & 255
    bits = code + _SCALE_OFFSET
    if UNIT == 0:
        bits += 8 << 3  # 2^8
    zero = ((head << 16) >> 24) * UNIT
    return tl.where(code == _NAN_SCALE, float("nan"), (bits << 20).to(tl.float32, bitcast=True)), zero.to(tl.float32)


@triton.jit
def _e4m3(value):
    """As `floats.to_e4m3`."""
    bits = value.to(tl.int32, bitcast=True)
    begin = tl.maximum(bits & 0x7F800000, 121 << 23)
    far = begin + (20 << 23)
    rounded = (tl.abs(value) + far.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    return ((begin >> 20) - (121 << 3) + rounded - far) | ((bits >> 24) & 128)


@triton.jit
def code(value, inverse, zero, BITS: tl.constexpr, UNIT: tl.constexpr):
    if UNIT == 0:
        found = tl.where(inverse > 0.0, _e4m3(value * inverse), 0)
    else:
        whole = ((value * inverse + _ROUND) - _ROUND) - zero
        inside = (whole > 0.0) & (inverse > 0.0)  # not for NaN
        found = tl.where(inside, tl.minimum(whole, (1 << BITS) - 1.0), 0.0).to(tl.int32)
    return found


@triton.jit
def sixteenths(value, inverse, zero):
    """Codes of 8 bits, of which the lower four are `fine`."""
    code = ((((value * inverse - zero) * 16.0) + _ROUND) - _ROUND) + 8.0
    return tl.where((code > 0.0) & (inverse > 0.0), tl.minimum(code, 255.0), tl.where(inverse > 0.0, 0.0, 8.0)).to(
        tl.int32
    )


@triton.jit
def value(code, scale, zero, UNIT: tl.constexpr):
    """Of codes, float32, by what `scale` gave. The bits of an e4m3 are those of a float16 of 2^-8 times its value."""
    if UNIT == 0:
        half = ((code & 128) << 8) | ((code & 127) << 7)
        found = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * scale
    else:
        found = (code.to(tl.float32) + zero) * scale
    return found


@triton.jit
def split(word, KIND: tl.constexpr):
    """A word's two elements as float32."""
    if KIND == _FLOAT16:
        first, second = (word & 0xFFFF).to(tl.uint16), (word >> 16).to(tl.uint16)
        first, second = first.to(tl.float16, bitcast=True), second.to(tl.float16, bitcast=True)
        first, second = first.to(tl.float32), second.to(tl.float32)
    else:
        if KIND == _BFLOAT16:
            first, second = word << 16, word & 0xFFFF0000
        else:
            first, second = (word & 0xFFFFFFFF).to(tl.uint32), (word >> 32).to(tl.uint32)
        first, second = first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def _element(value, KIND: tl.constexpr, UNIT: tl.constexpr):
    """float32 as the bits of an element, uint32: rounded, and NaN made, as the CPU does, which machines differ in."""
    real = value == value
    if KIND == _BFLOAT16:
        bits = value.to(tl.uint32, bitcast=True)
        if UNIT != 0:  # an e4m3 times a scale has no more bits than a bfloat16
            bits += 0x7FFF + ((bits >> 16) & 1)
        bits >>= 16
    elif KIND == _FLOAT16:
        value = tl.minimum(tl.maximum(value, -_FLOAT16_MAX), _FLOAT16_MAX)
        bits = value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        bits = value.to(tl.uint32, bitcast=True)
    return tl.where(real, bits, _NANS[KIND])


@triton.jit
def join(first, second, KIND: tl.constexpr, UNIT: tl.constexpr):
    """Two float32 as a word of elements: `split`, the other way."""
    low, high = _element(first, KIND, UNIT), _element(second, KIND, UNIT)
    if KIND == FLOAT32:
        word = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
    else:
        word = low | (high << 16)
    return word
