"""One Triton kernel that turns keys in place. Imports triton: import it only where a CUDA device is used."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "token_stride", "head_stride"])
def _turn(
    keys,
    rows,
    cosines,
    sines,
    tokens,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    POWER: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.arange(0, POWER)
    there = (token < tokens)[:, None] & (pair < PAIRS)[None, :]
    row = tl.load(rows + token, mask=token < tokens, other=0)
    angle = token[:, None] * PAIRS + pair[None, :]
    cosine = tl.load(cosines + angle, mask=there, other=0.0)
    sine = tl.load(sines + angle, mask=there, other=0.0)
    step: tl.constexpr = 2 if INTERLEAVED else 1
    other: tl.constexpr = 1 if INTERLEAVED else PAIRS
    start = keys + row[:, None] * token_stride + pair[None, :] * step
    for head in tl.static_range(HEADS):
        place = start + head * head_stride
        first = tl.load(place, mask=there, other=0.0).to(tl.float32)
        second = tl.load(place + other, mask=there, other=0.0).to(tl.float32)
        tl.store(place, (first * cosine - second * sine).to(keys.dtype.element_ty), mask=there)
        tl.store(place + other, (second * cosine + first * sine).to(keys.dtype.element_ty), mask=there)


def turn(keys: Any, rows: Any, cosines: Any, sines: Any, *, interleaved: bool) -> None:
    """See `Turn.apply`, on the current stream. keys: [tokens, heads, dim], its last dim packed; rows: distinct."""
    tokens, pairs = cosines.shape
    if not tokens:
        return
    block = 16
    _turn[(triton.cdiv(tokens, block),)](
        keys,
        rows,
        cosines,
        sines,
        tokens,
        keys.stride(0),
        keys.stride(1),
        HEADS=keys.shape[1],
        PAIRS=pairs,
        POWER=triton.next_power_of_2(pairs),
        INTERLEAVED=interleaved,
        BLOCK=block,
    )
