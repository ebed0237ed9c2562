"""One Triton kernel between a paged cache and quantized rows, bit for bit what `codec.quantized` does. Imports triton:
import it only where a CUDA device is used.

A program takes 16 tokens of some channels of a layer: whole groups of K and of V. It sees channels in pairs, a word of
the cache each: their codes of 4 bits are one byte.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import triton
import triton.language as tl

from cairn.codec.quantized import GROUP, Quantizer
from cairn.copy import triton_groups as groups

#: What lets a thread move four words at once.
ALIGNMENT = 16
#: Pairs of channels of a program, which is one warp: each thread has all 16 tokens of four pairs, so that groups along
#: tokens need nothing of other threads.
_TILE = tl.constexpr(128)
_GROUP = tl.constexpr(GROUP)


@triton.jit
def _coded_along_tokens(a, b, heads, more, real, finely, BITS: tl.constexpr, UNIT: tl.constexpr, FINE: tl.constexpr):
    """Codes of pairs of channels [16, pairs], each a group, whose heads it stores. finely: where its first token is."""
    a_key, b_key = groups.key(a, UNIT), groups.key(b, UNIT)
    a_low, a_high = groups.ends(a_key, a_key, 0, UNIT)
    b_low, b_high = groups.ends(b_key, b_key, 0, UNIT)
    a_head, a_inverse, a_zero = groups.head(a_low, a_high, BITS, UNIT)
    b_head, b_inverse, b_zero = groups.head(b_low, b_high, BITS, UNIT)
    both_heads = a_head | (b_head << (16 if UNIT else 8))
    tl.store(heads, both_heads.to(heads.dtype.element_ty), mask=real)
    a_code = groups.code(a, a_inverse[None, :], a_zero[None, :], BITS, UNIT)
    b_code = groups.code(b, b_inverse[None, :], b_zero[None, :], BITS, UNIT)
    if FINE:
        a_fine = tl.where(finely, groups.sixteenths(a, a_inverse[None, :], a_zero[None, :]), 0)
        b_fine = tl.where(finely, groups.sixteenths(b, b_inverse[None, :], b_zero[None, :]), 0)
        a_code, b_code = tl.where(finely, a_fine >> 4, a_code), tl.where(finely, b_fine >> 4, b_code)
        both = tl.reduce((a_fine & 15) | ((b_fine & 15) << 4), 0, groups.most)
        tl.store(more, both.to(tl.uint8), mask=real)
    return a_code, b_code


@triton.jit
def _scales_along_tokens(heads, more, real, finely, UNIT: tl.constexpr, FINE: tl.constexpr):
    """(scale, zero) of either channel of a pair; see `_coded_along_tokens`."""
    both_heads = tl.load(heads, mask=real, other=0).to(tl.int32)[None, :]
    a_scale, a_zero = groups.scale(both_heads & 0xFFFF, UNIT)
    b_scale, b_zero = groups.scale((both_heads >> (16 if UNIT else 8)) & 0xFFFF, UNIT)
    if FINE:
        both = tl.load(more, mask=real, other=0).to(tl.int32)[None, :]
        a_zero += tl.where(finely, ((both & 15) - 8).to(tl.float32) * (1 / 16), 0.0)
        b_zero += tl.where(finely, ((both >> 4) - 8).to(tl.float32) * (1 / 16), 0.0)
    return a_scale, a_zero, b_scale, b_zero


@triton.jit
def _coded_along_channels(a, b, heads, whole, BITS: tl.constexpr, UNIT: tl.constexpr):
    """Codes of pairs of channels [16, pairs], of which 8 of a token are a group, whose heads it stores."""
    a_key, b_key = groups.key(a, UNIT), groups.key(b, UNIT)
    low = tl.reshape(tl.minimum(a_key, b_key), (_GROUP, _TILE // 8, 8))
    high = tl.reshape(tl.maximum(a_key, b_key), (_GROUP, _TILE // 8, 8))
    low, high = groups.ends(low, high, 2, UNIT)
    head, inverse, zero = groups.head(low, high, BITS, UNIT)
    tl.store(heads, head.to(heads.dtype.element_ty), mask=whole)
    inverse, zero = _spread(inverse), _spread(zero)
    return groups.code(a, inverse, zero, BITS, UNIT), groups.code(b, inverse, zero, BITS, UNIT)


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
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    LAYER_BYTES: tl.constexpr,
    ALIGN: tl.constexpr,
    INTO_ROWS: tl.constexpr,
):
    word_type: tl.constexpr = tl.uint64 if KIND == groups.FLOAT32 else tl.uint32
    head_type: tl.constexpr = tl.uint16 if UNIT else tl.uint8
    heads_type: tl.constexpr = tl.uint32 if UNIT else tl.uint16
    fine: tl.constexpr = BITS == 4 and PLANES == 2
    words: tl.constexpr = HEADS * HEAD_WORDS
    tiles: tl.constexpr = (words + _TILE - 1) // _TILE
    cuts: tl.constexpr = BLOCK_TOKENS // _GROUP * tiles
    heads_bytes: tl.constexpr = BLOCK_TOKENS * words * (4 if UNIT else 2) // _GROUP
    plane_bytes: tl.constexpr = heads_bytes + BLOCK_TOKENS * words * 2 * BITS // 8
    job = tl.program_id(0)
    while job < jobs:  # not a `range`: the interpreter cannot make one of tensors with numpy 2.4
        cut = job % cuts
        layer = job // cuts % layers
        block = (job // cuts // layers).to(tl.int64)
        first, tile = cut // tiles * _GROUP, cut % tiles
        word = tile * _TILE + tl.arange(0, _TILE)
        group = tile * (_TILE // 8) + tl.arange(0, _TILE // 8)
        token = first + tl.arange(0, _GROUP)
        finely = (token == first)[:, None]
        slot = tl.load(slots + block * BLOCK_TOKENS + token)
        kept = slot >= 0
        slot = tl.where(kept, slot, 0)
        place = slot // PAGE_TOKENS * page_words + slot % PAGE_TOKENS * token_words
        place = place[:, None] + ((word // HEAD_WORDS).to(tl.int64) * head_words + word % HEAD_WORDS)[None, :]
        real = word < words
        mask = kept[:, None] & real[None, :]
        inside = token[:, None] * words + word[None, :]
        first_row = rows + (block * layers + layer) * LAYER_BYTES
        if not INTO_ROWS:
            pair = tl.load(_codes(first_row + heads_bytes, BITS) + inside, mask=mask, other=0)
        for plane in tl.static_range(PLANES):
            # Offsets of elements to aligned pointers: from addresses alone nobody could tell that words are neighbours.
            base = tl.load(bases + layer * PLANES + plane).to(tl.pointer_type(word_type))
            if ALIGN:
                base = tl.multiple_of(base, 16)
            outside = base + place
            row = first_row + plane * plane_bytes
            if PLANES == 2 and plane == 0:
                more = (row + PLANES * plane_bytes).to(tl.pointer_type(tl.uint8)) + first // _GROUP * words + word
                heads = tl.multiple_of(row.to(tl.pointer_type(heads_type)), 16) + first // _GROUP * words + word
                if INTO_ROWS:
                    x, y = groups.split(tl.load(outside, mask=mask, other=0), KIND)
                    a, b = _coded_along_tokens(x, y, heads, more, real, finely, BITS, UNIT, fine)
                else:
                    a_scale, a_zero, b_scale, b_zero = _scales_along_tokens(heads, more, real, finely, UNIT, fine)
            else:
                heads = tl.multiple_of(row.to(tl.pointer_type(head_type)), 16)
                heads += token[:, None] * (words // 8) + group[None, :]
                whole = group[None, :] * 8 < words
                if INTO_ROWS:
                    x, y = groups.split(tl.load(outside, mask=mask, other=0), KIND)
                    a, b = _coded_along_channels(x, y, heads, whole, BITS, UNIT)
                else:
                    scale, zero = groups.scale(tl.load(heads, mask=whole, other=0).to(tl.int32), UNIT)
                    a_scale, a_zero = _spread(scale), _spread(zero)
                    b_scale, b_zero = a_scale, a_zero
            if INTO_ROWS:
                codes = _codes(row + heads_bytes, BITS)
                tl.store(codes + inside, (a | (b << BITS)).to(codes.dtype.element_ty), mask=mask)
            else:
                both = pair.to(tl.int32)
                if plane + 1 < PLANES:  # on their way while these are computed
                    pair = tl.load(_codes(row + plane_bytes + heads_bytes, BITS) + inside, mask=mask, other=0)
                low = groups.value(both & ((1 << BITS) - 1), a_scale, a_zero, UNIT)
                high = groups.value(both >> BITS, b_scale, b_zero, UNIT)
                tl.store(outside, groups.join(low, high, KIND, UNIT), mask=mask)
        job += tl.num_programs(0)


@triton.jit
def _codes(address, BITS: tl.constexpr):
    """A pointer to the codes of pairs of channels: of four words of the cache, as a thread has them, in one piece."""
    pair_type: tl.constexpr = tl.uint8 if BITS == 4 else tl.uint16
    return tl.multiple_of(address.to(tl.pointer_type(pair_type)), BITS)


@triton.jit
def _spread(by_group):
    """[16, groups] as [16, pairs]."""
    wide = tl.broadcast_to(by_group[:, :, None], (_GROUP, _TILE // 8, 8))
    return tl.reshape(wide, (_GROUP, _TILE))


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
    tiles = triton.cdiv(g.kv_heads * head_words, _TILE.value)
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
        KIND=quantizer.kind,
        BITS=quantizer.bits,
        UNIT=quantizer.unit,
        LAYER_BYTES=quantizer.stored.layer_bytes,
        ALIGN=aligned,
        INTO_ROWS=into_rows,
        num_warps=1,
        enable_fp_fusion=False,  # the CPU's products and sums are rounded one by one
    )
