"""`cachegen`'s streams in Triton, the same bits as the CPU's. Imports triton: import it only where a GPU is used.

A warp decodes a stream: 32 lanes, a lane a thread, as `rans` lays it out; a program has WARPS of them, tensors of
[WARPS * 32], because a multiprocessor holds more warps than programs. Which of the next words is its own a lane learns
from how many lanes before it need one: a ballot. Values go straight into the rows, so nothing is kept between decoding
and the cache.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from cairn.codec import rans, rotary, tables

#: Streams, and so warps, of a program.
WARPS = tl.constexpr(4)
#: Tokens that a decoder's loop takes at a time.
UNROLL = tl.constexpr(4)

_LANES, _START = tl.constexpr(rans.LANES), tl.constexpr(rans.START)
_SYMBOLS, _HALF, _WIDTHS = tl.constexpr(tables.SYMBOLS), tl.constexpr(tables.HALF), tl.constexpr(tables.WIDTHS)
_SLOT_BITS, _SLOTS = tl.constexpr(tables.SLOT_BITS), tl.constexpr(1 << tables.SLOT_BITS)
_SINE_BITS, SINE_UNIT = tl.constexpr(rotary.SINE_BITS), tl.constexpr(1 << rotary.SINE_BITS)


# Not tl.sum and tl.cumsum: these are kernels too, which only run interpreted if triton was first imported so.
@triton.jit
def add(a, b):
    return a + b


_INTERPRETED = tl.constexpr(isinstance(add, InterpretedFunction))


@triton.jit
def pairing(place, pairs):
    """Of places in a head, counted from the first that turns: whether they turn, whether they are the first ones of
    their pairs, which pair it is, and how far the other one is away."""
    turning = (place >= 0) & (place < 2 * pairs)
    is_first = place < pairs
    return turning, is_first, tl.where(is_first, place, place - pairs), tl.where(is_first, pairs, -pairs)


@triton.jit
def _turns(need):
    """Of int32 flags [WARPS * 32]: how many lanes before each one, and how many in its whole warp, have theirs set.

    By the warp's vote, which counts on neighbours being one warp's threads, as they are in a tensor with one dimension
    and as many elements as there are threads. The interpreter has none.
    """
    if not _INTERPRETED:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            .reg .b32 all, before;
            setp.ne.u32 p, $2, 0;
            vote.sync.ballot.b32 all, p, 0xffffffff;
            mov.u32 before, %lanemask_lt;
            and.b32 before, before, all;
            popc.b32 $0, before;
            popc.b32 $1, all;
            }
            """,
            "=r,=r,r",
            [need],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    warps = tl.reshape(need, (WARPS, _LANES))
    before = tl.associative_scan(warps, 1, add) - warps
    whole = before * 0 + tl.reduce(warps, 1, add)[:, None]
    return tl.reshape(before, (WARPS * _LANES,)), tl.reshape(whole, (WARPS * _LANES,))


@triton.jit
def _element(value, BFLOAT16: tl.constexpr, dtype: tl.constexpr):
    """float32 as the cache's element, bfloat16 as uint16, rounded: here, where the interpreter's cast cuts off."""
    if BFLOAT16 and not _INTERPRETED:
        return value.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    if BFLOAT16:
        bits = value.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    return value.to(dtype)


@triton.jit
def predict(anchor, partner, turn, turning, is_first):
    """What is expected of channels where `turn` holds cosine and sine, in steps: see `planes.predict`."""
    sine = (turn << 16) >> 16
    across = tl.where(is_first, -partner * sine, partner * sine)
    turned = (anchor * (turn >> 16) + across + SINE_UNIT // 2) >> _SINE_BITS
    return tl.where(turning, turned, anchor)


@triton.jit
def _next(x, words, table, low, real):
    """The next residual of each lane, its state behind it, and how many of the words its warp has taken."""
    rest = x & ((1 << low) - 1)
    y = x >> low
    entry = tl.load(table + (y & (_SLOTS - 1)).to(tl.int32), mask=real, other=0)
    y = ((entry >> 11) & 2047) * (y >> _SLOT_BITS) + (entry & 2047)
    residual = (((entry >> 22).to(tl.int32) - _HALF) << low.to(tl.int32)) | rest.to(tl.int32)
    short = real & (y < _START)
    before, taken = _turns(short.to(tl.int32))
    word = tl.load(words + before, mask=short, other=0).to(tl.uint32)
    return residual, tl.where(real, tl.where(short, (y << 16) | word, y), x), taken


@triton.jit
def _decode_streams(tensors, numbers, KEYS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BFLOAT16: tl.constexpr):
    words, spans, states, classes, anchors, steps, decoder, turns, rows, offsets, wrong = tensors
    tokens, channels, dim, pairs, first, row_stride, streams, groups = numbers
    plane = tl.program_id(0)  # layer * planes + plane
    thread = tl.arange(0, WARPS * _LANES)
    stream, lane = tl.program_id(1) * WARPS + thread // _LANES, thread % _LANES
    mine = stream < streams
    job = plane * streams + stream
    x = tl.load(states + job * _LANES + lane, mask=mine, other=0)
    span = spans + 2 * job
    next_words = words + tl.load(span, mask=mine, other=0)
    base = rows + tl.load(offsets + plane)
    group = 0
    while group < groups:
        channel = (stream * groups + group) * _LANES + lane
        real = mine & (channel < channels)
        of_plane = plane * channels + channel
        klass = tl.load(classes + of_plane, mask=real, other=0).to(tl.uint32)
        low = klass >> 4
        table = decoder + ((klass & (_WIDTHS - 1)) << _SLOT_BITS).to(tl.int32)
        anchor = tl.load(anchors + of_plane, mask=real, other=0).to(tl.int32)
        step = tl.load(steps + plane * (channels // dim) + channel // dim, mask=real, other=0.0)
        if KEYS:
            turning, is_first, pair, beside = pairing(channel % dim - first, pairs)
            turning = turning & real
            partner = tl.load(anchors + of_plane + beside, mask=turning, other=0).to(tl.int32)
            turn = turns + pair
        t = 0
        block = base + channel
        while t < tokens:
            target = block
            for _ in tl.range(0, BLOCK_TOKENS, loop_unroll_factor=UNROLL):
                residual, x, taken = _next(x, next_words, table, low, real)
                next_words += taken
                expected = anchor
                if KEYS:
                    at_turn = tl.load(turn, mask=turning, other=0)
                    expected = predict(anchor, partner, at_turn, turning, is_first)
                    turn += pairs
                value = (residual + expected).to(tl.float32) * step
                tl.store(target, _element(value, BFLOAT16, rows.dtype.element_ty), mask=real)
                target += channels
            t += BLOCK_TOKENS
            block += row_stride
        group += 1
    end = words + tl.load(span + 1, mask=mine, other=0)
    missed = mine & ((x != _START) | (next_words.to(tl.int64) != end.to(tl.int64)))
    tl.atomic_max(wrong + lane * 0, missed.to(tl.int32), mask=missed)


@triton.jit(do_not_specialize=["tokens", "channels", "pairs", "first", "row_stride", "streams", "groups"])
def _decode(
    words,
    spans,
    states,
    classes,
    anchors,
    steps,
    decoder,
    turns,
    rows,
    offsets,
    wrong,
    tokens,
    channels,
    dim,
    pairs,
    first,
    row_stride,
    streams,
    groups,
    planes,
    BLOCK_TOKENS: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    tensors = (words, spans, states, classes, anchors, steps, decoder, turns, rows, offsets, wrong)
    numbers = (tokens, channels, dim, pairs, first, row_stride, streams, groups)
    if tl.program_id(0) % planes == 0:
        _decode_streams(tensors, numbers, True, BLOCK_TOKENS, BFLOAT16)
    else:
        _decode_streams(tensors, numbers, False, BLOCK_TOKENS, BFLOAT16)


@triton.jit(do_not_specialize=["tokens", "channels", "streams", "room", "groups"])
def _encode(
    residuals,
    classes,
    encoder,
    words,
    counts,
    states,
    tokens,
    channels,
    streams,
    room,
    groups,
):
    plane = tl.program_id(0)
    thread = tl.arange(0, WARPS * _LANES)
    stream, lane = tl.program_id(1) * WARPS + thread // _LANES, thread % _LANES
    mine = stream < streams
    job = plane * streams + stream
    x = tl.full((WARPS * _LANES,), _START, tl.uint32)
    # Written from the end of the room to its front, so that a decoder reads forwards.
    end = words + (job + 1).to(tl.int64) * room
    at = tl.full((WARPS * _LANES,), 0, tl.int32)
    group = groups - 1
    while group >= 0:
        channel = (stream * groups + group) * _LANES + lane
        real = mine & (channel < channels)
        klass = tl.load(classes + plane * channels + channel, mask=real, other=0).to(tl.uint32)
        low = klass >> 4
        table = encoder + ((klass & (_WIDTHS - 1)) * _SYMBOLS).to(tl.int32)
        source = residuals + (plane.to(tl.int64) * tokens + tokens - 1) * channels + channel
        t = tokens - 1
        while t >= 0:
            residual = tl.load(source, mask=real, other=0).to(tl.int32)
            entry = tl.load(table + (residual >> low.to(tl.int32)) + _HALF, mask=real, other=1)
            freq, start = entry & 0xFFFF, entry >> 16
            # This does not fit 32 bits where freq is all of the slots; none is.
            emit = real & (x >= (freq << (32 - _SLOT_BITS)) >> low)
            need = emit.to(tl.int32)
            before, given = _turns(need)
            # A lane's word stands in front of those of higher lanes, which a decoder reads later.
            at -= given
            tl.store(end + at + before, (x & 0xFFFF).to(tl.uint16), mask=emit)
            y = tl.where(emit, x >> 16, x)
            y = ((y // freq) << _SLOT_BITS) + y % freq + start
            y = (y << low) | (residual.to(tl.uint32) & ((1 << low) - 1))
            x = tl.where(real, y, x)
            source -= channels
            t -= 1
        group -= 1
    tl.store(states + job * _LANES + lane, x, mask=mine)
    tl.store(counts + job, -at, mask=mine & (lane == 0))


def turns_of(sines: npt.NDArray[np.int16]) -> npt.NDArray[np.int32]:
    """Cosines and sines, int16 [2, tokens, pairs] of `rotary`, as a decoder loads them: int32 [tokens, pairs]."""
    cosine, sine = sines.astype(np.int32)
    return np.ascontiguousarray(cosine << 16 | sine & 0xFFFF)


def _grid(planes: int, streams: int) -> tuple[int, int]:
    """The programs for so many streams."""
    return planes, triton.cdiv(streams, WARPS.value)


def decode(
    words: Any,
    spans: Any,
    states: Any,
    classes: Any,
    anchors: Any,
    steps: Any,
    decoder: Any,
    turns: Any,
    rows: Any,
    offsets: Any,
    wrong: Any,
    *,
    tokens: int,
    block_tokens: int,
    heads: int,
    dim: int,
    first: int,
    groups: int,
    planes: int,
) -> None:
    """Enqueues the decoding of whole planes into rows. Torch tensors on the device, contiguous but for rows:

    words: uint16, and behind the last stream room for what one that is none may read, tokens * 32 * groups. spans:
    int64 [planes, streams, 2], where each stream begins in it and ends. states: uint32 [planes, streams, 32]. classes:
    uint8, sound, anchors: int16 [planes, channels]. steps: float32 [planes, heads]. decoder: uint32, of `tables`.
    turns: int32 [tokens, pairs], of `turns_of`. rows: [blocks, row_stride] elements of the cache's dtype. offsets:
    int64 [planes], where each plane begins in a row. wrong: int32 [1], becomes 1 where a stream does not end as an
    encoder's begins. Every plane of layer after layer; keys are those whose number is a multiple of `planes`, the
    planes of a layer. Exact vectors are patched by the caller.
    """
    count, streams, _ = states.shape
    bfloat16 = rows.dtype == torch.bfloat16
    if bfloat16:
        rows = rows.view(torch.uint16)
    _decode[_grid(count, streams)](
        words,
        spans,
        states,
        classes,
        anchors,
        steps,
        decoder,
        turns,
        rows,
        offsets,
        wrong,
        tokens,
        heads * dim,
        dim,
        turns.shape[1],
        first,
        rows.stride(0),
        streams,
        groups,
        planes,
        BLOCK_TOKENS=block_tokens,
        BFLOAT16=bfloat16,
        num_warps=WARPS.value,
    )


def encode(residuals: Any, classes: Any, encoder: Any, words: Any, counts: Any, states: Any, *, groups: int) -> None:
    """Enqueues the coding of whole planes. Torch tensors on the device, contiguous:

    residuals: int16 [planes, tokens, channels], within their classes' ranges. classes: uint8 [planes, channels].
    encoder: uint32, of `tables`. words: uint16 [planes, streams, room], room at least tokens * 32 * groups: a stream is
    the last `counts` (int32 [planes, streams]) words of its room. states: uint32 [planes, streams, 32].
    """
    _, tokens, channels = residuals.shape
    count, streams, room = words.shape
    _encode[_grid(count, streams)](
        residuals,
        classes,
        encoder,
        words,
        counts,
        states,
        tokens,
        channels,
        streams,
        room,
        groups,
        num_warps=WARPS.value,
    )
