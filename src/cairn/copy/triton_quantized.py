"""One Triton kernel between a paged cache and quantized rows, bit for bit what `codec.quantized` does. Imports triton:
import it only where a CUDA device is used.

A program takes 16 tokens of some channels of a layer: whole groups of K and of V. It sees channels in pairs, a word of
the cache each: their codes of 4 bits are one byte.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import triton
import triton.language as tl

from cairn.codec.quantized import FLOAT16_MAX, GROUP, MOST_ZERO, NAN_SCALE, NANS, SCALE_OFFSET, Quantizer

#: What lets a thread move four words at once.
ALIGNMENT = 16
#: Pairs of channels of a program, which is one warp: each thread has all 16 tokens of four pairs, so that groups along
#: tokens need nothing of other threads.
_TILE = 128
_BFLOAT16, _FLOAT16 = tl.constexpr(0), tl.constexpr(1)
_GROUP = tl.constexpr(GROUP)
_INFINITY = tl.constexpr(0x7F800000)
_SCALE_OFFSET, _NAN_SCALE = tl.constexpr(SCALE_OFFSET), tl.constexpr(NAN_SCALE)
_MOST_ZERO, _FLOAT16_MAX = tl.constexpr(float(MOST_ZERO)), tl.constexpr(FLOAT16_MAX)
#: Added to and taken from a float32 it rounds to nearest even, as long as nobody fuses it with what comes before.
_ROUND = tl.constexpr(12582912.0)


# Not tl.max: that is a kernel too, which only runs interpreted if triton was first imported so.
@triton.jit
def _wider(low, high, other_low, other_high):
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def _most(one, other):
    return tl.maximum(one, other)


@triton.jit
def _key(bits):
    """int32 bits of floats as numbers ordered as their values are, and the way back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _head(low_key, high_key, BITS: tl.constexpr, UNIT: tl.constexpr):
    """(head, 1 / scale, UNIT * zero) of groups, from the keys of their ends."""
    low, high = _key(low_key).to(tl.float32, bitcast=True), _key(high_key).to(tl.float32, bitcast=True)
    largest = tl.maximum(tl.abs(low), tl.abs(high))
    wanted = tl.maximum((high - low) * (1 / ((1 << BITS) - UNIT)), largest * (1 / (_MOST_ZERO * UNIT)))
    code = ((wanted.to(tl.uint32, bitcast=True) + 0xFFFFF) >> 20).to(tl.int32) - _SCALE_OFFSET
    bad = (high_key >= _INFINITY) | (low_key < -_INFINITY) | (code >= _NAN_SCALE)
    code = tl.where(bad, _NAN_SCALE, tl.maximum(code, 0))
    scale = ((code + _SCALE_OFFSET) << 20).to(tl.float32, bitcast=True)
    inverse = tl.where(bad, 0.0, tl.div_rn(tl.full(low.shape, 1.0, tl.float32), scale))
    zero = tl.where(bad, 0.0, ((low * inverse - (UNIT - 1) / 2) * (1 / UNIT) + _ROUND) - _ROUND)
    return code | ((zero.to(tl.int32) & 255) << 8), inverse, zero * UNIT


@triton.jit
def _scale(head, UNIT: tl.constexpr):
    """(scale, UNIT * zero) of heads; NaN where a group comes back as NaN."""
    code = head & 255
    scale = ((code + _SCALE_OFFSET) << 20).to(tl.float32, bitcast=True)
    zero = ((head << 16) >> 24) * UNIT
    return tl.where(code == _NAN_SCALE, float("nan"), scale), zero.to(tl.float32)


@triton.jit
def _code(value, inverse, zero, BITS: tl.constexpr):
    code = ((value * inverse + _ROUND) - _ROUND) - zero
    inside = (code > 0.0) & (inverse > 0.0)  # not for NaN
    return tl.where(inside, tl.minimum(code, (1 << BITS) - 1.0), 0.0).to(tl.int32)


@triton.jit
def _sixteenths(value, inverse, zero):
    """Codes of 8 bits, of which the lower four are `fine`."""
    code = ((((value * inverse - zero) * 16.0) + _ROUND) - _ROUND) + 8.0
    return tl.where((code > 0.0) & (inverse > 0.0), tl.minimum(code, 255.0), tl.where(inverse > 0.0, 0.0, 8.0)).to(
        tl.int32
    )


@triton.jit
def _split(word, KIND: tl.constexpr):
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
def _element(value, KIND: tl.constexpr, NAN: tl.constexpr):
    """float32 as the bits of an element, uint32: rounded, and NaN made, as the CPU does, which machines differ in."""
    real = value == value
    if KIND == _BFLOAT16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    elif KIND == _FLOAT16:
        value = tl.minimum(tl.maximum(value, -_FLOAT16_MAX), _FLOAT16_MAX)
        bits = value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        bits = value.to(tl.uint32, bitcast=True)
    return tl.where(real, bits, NAN)


@triton.jit
def _coded_along_tokens(a, b, heads, more, real, finely, BITS: tl.constexpr, UNIT: tl.constexpr, FINE: tl.constexpr):
    """Codes of pairs of channels [16, pairs], each a group, whose heads it stores. finely: where its first token is."""
    a_key, b_key = _key(a.to(tl.int32, bitcast=True)), _key(b.to(tl.int32, bitcast=True))
    a_low, a_high = tl.reduce((a_key, a_key), 0, _wider)
    b_low, b_high = tl.reduce((b_key, b_key), 0, _wider)
    a_head, a_inverse, a_zero = _head(a_low, a_high, BITS, UNIT)
    b_head, b_inverse, b_zero = _head(b_low, b_high, BITS, UNIT)
    tl.store(heads, (a_head | (b_head << 16)).to(tl.uint32, bitcast=True), mask=real)
    a_code = _code(a, a_inverse[None, :], a_zero[None, :], BITS)
    b_code = _code(b, b_inverse[None, :], b_zero[None, :], BITS)
    if FINE:
        a_fine = tl.where(finely, _sixteenths(a, a_inverse[None, :], a_zero[None, :]), 0)
        b_fine = tl.where(finely, _sixteenths(b, b_inverse[None, :], b_zero[None, :]), 0)
        a_code, b_code = tl.where(finely, a_fine >> 4, a_code), tl.where(finely, b_fine >> 4, b_code)
        both = tl.reduce((a_fine & 15) | ((b_fine & 15) << 4), 0, _most)
        tl.store(more, both.to(tl.uint8), mask=real)
    return a_code, b_code


@triton.jit
def _scales_along_tokens(heads, more, real, finely, UNIT: tl.constexpr, FINE: tl.constexpr):
    """(scale, zero) of either channel of a pair; see `_coded_along_tokens`."""
    head = tl.load(heads, mask=real, other=0).to(tl.int32, bitcast=True)
    a_scale, a_zero = _scale(head[None, :] & 0xFFFF, UNIT)
    b_scale, b_zero = _scale((head[None, :] >> 16) & 0xFFFF, UNIT)
    if FINE:
        both = tl.load(more, mask=real, other=0).to(tl.int32)[None, :]
        a_zero += tl.where(finely, ((both & 15) - 8).to(tl.float32) * (1 / 16), 0.0)
        b_zero += tl.where(finely, ((both >> 4) - 8).to(tl.float32) * (1 / 16), 0.0)
    return a_scale, a_zero, b_scale, b_zero


@triton.jit
def _coded_along_channels(a, b, heads, whole, BITS: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr):
    """Codes of pairs of channels [16, pairs], of which 8 of a token are a group, whose heads it stores."""
    a_key, b_key = _key(a.to(tl.int32, bitcast=True)), _key(b.to(tl.int32, bitcast=True))
    low = tl.reshape(tl.minimum(a_key, b_key), (_GROUP, TILE // 8, 8))
    high = tl.reshape(tl.maximum(a_key, b_key), (_GROUP, TILE // 8, 8))
    low, high = tl.reduce((low, high), 2, _wider)
    head, inverse, zero = _head(low, high, BITS, UNIT)
    tl.store(heads, head.to(tl.uint16), mask=whole)
    inverse, zero = _spread(inverse, TILE), _spread(zero, TILE)
    return _code(a, inverse, zero, BITS), _code(b, inverse, zero, BITS)


# `jobs` is not specialized: each new number would be compiled while a request waits. All else is a cache's own.
@triton.jit(do_not_specialize=["jobs", "layers"], do_not_specialize_on_alignment=["slots"])
def _move(
    bases,
    slots,
    rows,
    page_words,
    token_words,
    head_words,
    jobs,
    layers,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_WORDS: tl.constexpr,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    PAIR: tl.constexpr,
    KIND: tl.constexpr,
    NAN: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    FINE: tl.constexpr,
    LAYER_BYTES: tl.constexpr,
    ALIGN: tl.constexpr,
    INTO_ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    words: tl.constexpr = HEADS * HEAD_WORDS
    tiles: tl.constexpr = (words + TILE - 1) // TILE
    cuts: tl.constexpr = BLOCK_TOKENS // _GROUP * tiles
    heads_bytes: tl.constexpr = BLOCK_TOKENS * words * 4 // _GROUP
    plane_bytes: tl.constexpr = heads_bytes + BLOCK_TOKENS * words * 2 * BITS // 8
    job = tl.program_id(0)
    while job < jobs:  # not a `range`: the interpreter cannot make one of tensors with numpy 2.4
        cut = job % cuts
        layer = job // cuts % layers
        block = (job // cuts // layers).to(tl.int64)
        first, tile = cut // tiles * _GROUP, cut % tiles
        word = tile * TILE + tl.arange(0, TILE)
        group = tile * (TILE // 8) + tl.arange(0, TILE // 8)
        token = first + tl.arange(0, _GROUP)
        finely = (token == first)[:, None]
        slot = tl.load(slots + block * BLOCK_TOKENS + token)
        kept = slot >= 0
        slot = tl.where(kept, slot, 0)
        place = slot // PAGE_TOKENS * page_words + slot % PAGE_TOKENS * token_words
        place = place[:, None] + ((word // HEAD_WORDS).to(tl.int64) * head_words + word % HEAD_WORDS)[None, :]
        real = word < words
        mask = kept[:, None] & real[None, :]
        for plane in tl.static_range(PLANES):
            # Offsets of elements to aligned pointers: from addresses alone nobody could tell that words are neighbours.
            base = tl.load(bases + layer * PLANES + plane).to(tl.pointer_type(WORD))
            if ALIGN:
                base = tl.multiple_of(base, 16)
            outside = base + place
            row = rows + (block * layers + layer) * LAYER_BYTES + plane * plane_bytes
            codes = tl.multiple_of(
                (row + heads_bytes).to(tl.pointer_type(PAIR)), BITS
            )  # four words a thread, as of the cache
            codes += token[:, None] * words + word[None, :]
            if PLANES == 2 and plane == 0:
                more = (row + PLANES * plane_bytes).to(tl.pointer_type(tl.uint8)) + first // _GROUP * words + word
                heads = tl.multiple_of(row.to(tl.pointer_type(tl.uint32)), 16) + first // _GROUP * words + word
                if INTO_ROWS:
                    x, y = _split(tl.load(outside, mask=mask, other=0), KIND)
                    a, b = _coded_along_tokens(x, y, heads, more, real, finely, BITS, UNIT, FINE)
                else:
                    a_scale, a_zero, b_scale, b_zero = _scales_along_tokens(heads, more, real, finely, UNIT, FINE)
            else:
                heads = tl.multiple_of(row.to(tl.pointer_type(tl.uint16)), 16)
                heads += token[:, None] * (words // 8) + group[None, :]
                whole = group[None, :] * 8 < words
                if INTO_ROWS:
                    x, y = _split(tl.load(outside, mask=mask, other=0), KIND)
                    a, b = _coded_along_channels(x, y, heads, whole, BITS, UNIT, TILE)
                else:
                    scale, zero = _scale(tl.load(heads, mask=whole, other=0).to(tl.int32), UNIT)
                    a_scale, a_zero = _spread(scale, TILE), _spread(zero, TILE)
                    b_scale, b_zero = a_scale, a_zero
            if INTO_ROWS:
                tl.store(codes, (a | (b << BITS)).to(PAIR), mask=mask)
            else:
                pair = tl.load(codes, mask=mask, other=0).to(tl.int32)
                low = ((pair & ((1 << BITS) - 1)).to(tl.float32) + a_zero) * a_scale
                high = ((pair >> BITS).to(tl.float32) + b_zero) * b_scale
                low_bits, high_bits = _element(low, KIND, NAN).to(WORD), _element(high, KIND, NAN).to(WORD)
                tl.store(outside, low_bits | (high_bits << (WORD_BYTES * 4)), mask=mask)
        job += tl.num_programs(0)


@triton.jit
def _spread(by_group, TILE: tl.constexpr):
    """[16, groups] as [16, pairs]."""
    wide = tl.broadcast_to(by_group[:, :, None], (_GROUP, TILE // 8, 8))
    return tl.reshape(wide, (_GROUP, TILE))


def move(
    bases: Any,
    slots: Any,
    rows: int,
    quantizer: Quantizer,
    *,
    blocks: int,
    layers: int,
    strides: tuple[int, int, int],
    page_tokens: int,
    aligned: bool,
    programs: int,
    into_rows: bool,
) -> None:
    """Enqueues the encoding (into_rows) or decoding of `blocks` blocks on the current stream.

    Torch tensors on the device: bases int64 [layers * planes], slots int64 [blocks * block_tokens]; negative ones are
    left out, which encoding must not have. rows: the address of the first row; one holds exactly these layers, and
    they stand one behind the other. strides: page, token, head, in bytes. aligned: whether bases and strides are
    multiples of ALIGNMENT. No blocks: only compiles.
    """
    g = quantizer.geometry
    head_words = g.head_dim // 2
    tiles = triton.cdiv(g.kv_heads * head_words, _TILE)
    jobs = blocks * layers * tiles * (g.block_tokens // GROUP)
    _move[(min(programs, max(1, jobs)),)](
        bases,
        slots,
        rows,
        *(stride // (2 * g.element_bytes) for stride in strides),
        jobs,
        layers,
        PAGE_TOKENS=page_tokens,
        BLOCK_TOKENS=g.block_tokens,
        PLANES=g.planes,
        HEADS=g.kv_heads,
        HEAD_WORDS=head_words,
        WORD=tl.uint64 if g.element_bytes == 4 else tl.uint32,
        WORD_BYTES=2 * g.element_bytes,
        PAIR=tl.uint8 if quantizer.bits == 4 else tl.uint16,
        KIND=quantizer.kind,
        NAN=NANS[quantizer.kind],
        BITS=quantizer.bits,
        UNIT=quantizer.unit,
        FINE=quantizer.fine,
        LAYER_BYTES=quantizer.stored.layer_bytes,
        ALIGN=aligned,
        INTO_ROWS=into_rows,
        TILE=_TILE,
        num_warps=1,
        enable_fp_fusion=False,  # the CPU's products and sums are rounded one by one
    )
