"""One Triton kernel between a paged cache and rows. Imports triton: import it only where a CUDA device is used."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import triton
import triton.language as tl

_BLOCK = 2048
_POINTERS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


# Not specialized: each new combination would be compiled while a request waits.
@triton.jit(
    do_not_specialize=["rows", "page_stride", "token_stride", "head_stride", "row_stride", "jobs", "planes"],
    do_not_specialize_on_alignment=["bases", "slots", "starts"],
)
def _move(
    bases,
    slots,
    starts,
    rows,
    page_stride,
    token_stride,
    head_stride,
    row_stride,
    jobs,
    planes,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_WORDS: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    WORD: tl.constexpr,
    INTO_ROWS: tl.constexpr,
    SCATTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    plane_words: tl.constexpr = BLOCK_TOKENS * HEADS * HEAD_WORDS
    cuts: tl.constexpr = (plane_words + BLOCK - 1) // BLOCK
    job = tl.program_id(0)
    while job < jobs:  # not a `range`: the interpreter cannot make one of tensors with numpy 2.4
        cut = job % cuts
        plane = job // cuts % planes
        row = (job // cuts // planes).to(tl.int64)
        word = cut * BLOCK + tl.arange(0, BLOCK)
        token = word // (HEADS * HEAD_WORDS)
        head = (word // HEAD_WORDS % HEADS).to(tl.int64)
        slot = tl.load(slots + row * BLOCK_TOKENS + token, mask=word < plane_words, other=-1)
        kept = slot >= 0
        slot = tl.where(kept, slot, 0)
        place = slot // PAGE_TOKENS * page_stride + slot % PAGE_TOKENS * token_stride
        outside = tl.load(bases + plane) + place + head * head_stride + word % HEAD_WORDS * WORD_BYTES
        start = tl.load(starts + row) if SCATTERED else rows + row * row_stride
        inside = start + (plane * plane_words + word).to(tl.int64) * WORD_BYTES
        if INTO_ROWS:
            source, target = outside, inside
        else:
            source, target = inside, outside
        value = tl.load(source.to(tl.pointer_type(WORD)), mask=kept)
        tl.store(target.to(tl.pointer_type(WORD)), value, mask=kept)
        job += tl.num_programs(0)


@triton.jit(do_not_specialize=["source", "count"], do_not_specialize_on_alignment=["target"])
def _fetch(target, source, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source.to(tl.pointer_type(tl.int64)) + at, mask=at < count)
    tl.store(target + at, value, mask=at < count)


def fetch(target: Any, source: int) -> None:
    """Enqueues on the current stream that a tensor on the device, int64 [n], gets what stands at an address of pinned
    host memory, which must stay as it is until then.
    """
    _fetch[(triton.cdiv(target.numel(), _BLOCK),)](target, source, target.numel(), BLOCK=_BLOCK)


def move(
    bases: Any,
    slots: Any,
    rows: Any,
    *,
    blocks: int,
    strides: tuple[int, int, int, int],
    page_tokens: int,
    block_tokens: int,
    heads: int,
    head_bytes: int,
    word: int,
    programs: int,
    into_rows: bool,
) -> None:
    """Enqueues a copy of `blocks` blocks on the current stream, by at most `programs` programs at a time.

    Torch tensors on the device: bases int64 [planes], slots int64 [blocks * block_tokens] (negative: left out). rows:
    the address of the first row (an int), or a tensor int64 [blocks] with the address of each; from there on a row
    holds exactly these planes. strides: page, token, head, row, in bytes. `word`: see `pieces.word_bytes`. Every
    address must be one the device can reach. No blocks: only compiles.
    """
    scattered = not isinstance(rows, int)
    words = block_tokens * heads * head_bytes // word
    jobs = blocks * bases.numel() * triton.cdiv(words, _BLOCK)
    _move[(min(programs, max(1, jobs)),)](
        bases,
        slots,
        rows if scattered else slots,
        0 if scattered else rows,
        *strides,
        jobs,
        bases.numel(),
        PAGE_TOKENS=page_tokens,
        BLOCK_TOKENS=block_tokens,
        HEADS=heads,
        HEAD_WORDS=head_bytes // word,
        WORD_BYTES=word,
        WORD=_POINTERS[word],
        INTO_ROWS=into_rows,
        SCATTERED=scattered,
        BLOCK=_BLOCK,
        num_warps=8,
    )
