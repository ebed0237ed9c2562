"""What an encoder of `cachegen` does beside the coding, in Triton: passes over a plane's values of which torch would
need a dozen, and sums in the CPU's order. `encoder_cuda` launches them, all without fused multiply-adds, which would
round once where a CPU rounds twice.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from cairn.codec.triton_kernels import SINE_UNIT, add, pairing, predict


@triton.jit
def _value(element):
    """A cache's element as float32; bfloat16 comes as uint16."""
    if element.dtype == tl.uint16:
        return (element.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return element.to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def moments(
    values,
    exact,
    turns,
    sums,
    squares,
    tokens,
    channels,
    dim,
    pairs,
    first,
    planes,
    BLOCK_TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sums of a plane's channels, turned back, and of their squares; `exact` vectors are left out: `fit_plane`."""
    plane, channel = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real, heads = channel < channels, channels // dim
    turning, is_first, pair, beside = pairing(channel % dim - first, tl.where(plane % planes == 0, pairs, 0))
    source = values + plane.to(tl.int64) * tokens * channels + channel
    skipped = exact + plane.to(tl.int64) * tokens * heads + channel // dim
    turn = turns + pair
    total = tl.full((CHANNELS,), 0, tl.float64)
    square = tl.full((CHANNELS,), 0, tl.float64)
    t = 0
    while t < tokens:
        for _ in tl.range(0, BLOCK_TOKENS, loop_unroll_factor=UNROLL):
            kept = tl.load(skipped, mask=real, other=1) == 0
            # Loaded whether kept or not, so that no load waits for another.
            x = tl.where(kept, _value(tl.load(source, mask=real, other=0)), 0.0)
            y = tl.where(kept, _value(tl.load(source + beside, mask=real & turning, other=0)), 0.0)
            at_turn = tl.load(turn, mask=real & turning, other=SINE_UNIT << 16)
            cosine = (at_turn >> 16).to(tl.float32) * (1.0 / SINE_UNIT)
            across = y * (((at_turn << 16) >> 16).to(tl.float32) * (1.0 / SINE_UNIT))
            total += x.to(tl.float64)
            total += (x * cosine + tl.where(is_first, across, -across) - x).to(tl.float64)
            square += (x * x).to(tl.float64)
            source += channels
            skipped += heads
            turn += pairs
        t += BLOCK_TOKENS
    tl.store(sums + plane * channels + channel, total, mask=real)
    tl.store(squares + plane * channels + channel, square, mask=real)


@triton.jit
def total(terms, totals, count, LENGTH: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr):
    """The sum of each row, float64 [count, LENGTH], from its first term to its last."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    found = tl.full((ROWS,), 0, tl.float64)
    for i in tl.range(0, LENGTH, loop_unroll_factor=UNROLL):
        found += tl.load(terms + row * LENGTH + i, mask=row < count, other=0.0)
    tl.store(totals + row, found, mask=row < count)


@triton.jit(do_not_specialize=["tokens"])
def subtract(
    values,
    exact,
    inverses,
    anchors,
    turns,
    residuals,
    powers,
    tokens,
    channels,
    dim,
    pairs,
    first,
    planes,
    FAR: tl.constexpr,
    MOST: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Residuals, 0 in `exact` vectors, to which are added those where one is out of range; and sums of their squares.

    A program has TOKENS tokens of a head.
    """
    row = tl.program_id(0)  # plane * heads + head
    heads = channels // dim
    plane, head = row // heads, row % heads
    token = plane.to(tl.int64) * tokens + tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    here = token < (plane.to(tl.int64) + 1) * tokens
    place = tl.arange(0, DIM)[None, :]
    turning, is_first, pair, beside = pairing(place - first, tl.where(plane % planes == 0, pairs, 0))
    within = place < dim
    anchor = tl.load(anchors + row * dim + place, mask=within, other=0).to(tl.int32)
    partner = tl.load(anchors + row * dim + place + beside, mask=within & turning, other=0).to(tl.int32)
    of_token = token - plane.to(tl.int64) * tokens
    turn = tl.load(turns + of_token * pairs + pair, mask=here & within & turning, other=0)
    kept = tl.load(exact + token * heads + head, mask=here, other=1) == 0
    at = token * channels + head * dim + place
    value = _value(tl.load(values + at, mask=kept & within, other=0))
    quotient = tl.minimum(tl.maximum(value * tl.load(inverses + row), -2.0 * FAR), 2.0 * FAR)
    # To the nearest whole number, ties to even, as 2**23 and more have no fractions.
    quotient = (quotient + 3.0 * (1 << 22)) - 3.0 * (1 << 22)
    residual = quotient.to(tl.int32) - predict(anchor, partner, turn, turning, is_first)
    wrong = (tl.abs(quotient) >= FAR) | (tl.abs(residual) > MOST)
    kept = kept & (tl.reduce((wrong & within).to(tl.int32), 1, add)[:, None] == 0)
    residual = tl.where(kept & within, residual, 0)
    tl.store(exact + token * heads + head, tl.where(kept, 0, 1).to(tl.uint8), mask=here)
    tl.store(residuals + at, residual.to(tl.int16), mask=here & within)
    power = tl.reduce(residual.to(tl.int64) * residual, 0, add)
    of_head = tl.arange(0, DIM)
    tl.atomic_add(powers + row * dim + of_head, power, mask=of_head < dim)


@triton.jit(do_not_specialize=["runs"])
def copy(source, begins, target, places, lengths, counts, runs, WORDS: tl.constexpr):
    """Copies the first `counts` of each plane's runs of bytes from their begins to their places, [planes, runs]. All of
    even places and lengths, so copied as uint16."""
    run, at = tl.program_id(1), tl.arange(0, WORDS).to(tl.int64)
    count = tl.load(counts + tl.program_id(0))
    while run < count:
        number = tl.program_id(0) * runs + run
        begin, place = tl.load(begins + number) // 2, tl.load(places + number) // 2
        length = tl.load(lengths + number) // 2
        done = length * 0
        while done < length:
            words = tl.load(source + begin + done + at, mask=done + at < length, other=0)
            tl.store(target + place + done + at, words, mask=done + at < length)
            done += WORDS
        run += tl.num_programs(1)
