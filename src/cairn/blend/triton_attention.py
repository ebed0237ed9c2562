"""Attention of some rows of a prompt, as one Triton kernel. Imports triton: import it only where a CUDA device is used.

The tiling and the running softmax are those of FlashAttention-2 (Dao, arXiv 2307.08691); what differs is that each row
says up to which token it looks.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import triton
import triton.language as tl

_ROWS, _TOKENS = 128, 64
_LOG2_E = 1.4426950408889634


@triton.jit
def _look(
    first,
    stop,
    query,
    limit,
    keys,
    values,
    key_row,
    value_row,
    scale,
    most,
    total,
    found,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One tile of tokens: the running softmax `most`, `total`, `found` goes on over them."""
    dim = tl.arange(0, query.shape[1])
    at = (first + tl.arange(0, TOKENS)).to(tl.int64)
    known, inside = at < stop, dim < DIM
    key = tl.load(keys + at[None, :] * key_row + dim[:, None], mask=inside[:, None] & known[None, :], other=0.0)
    scores = tl.dot(query, key, input_precision="ieee") * scale
    scores = tl.where(at[None, :] <= limit[:, None], scores, float("-inf"))
    top = tl.maximum(most, tl.max(scores, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # rows that are not there look at nothing
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(most - base)
    value = tl.load(values + at[:, None] * value_row + dim[None, :], mask=known[:, None] & inside[None, :], other=0.0)
    found = tl.dot(weights.to(value.dtype), value, found * fade[:, None], input_precision="ieee")
    return top, total * fade + tl.sum(weights, 1), found


@triton.jit(do_not_specialize=["rows"])
def _attend(
    queries,
    keys,
    values,
    positions,
    out,
    rows,
    scale,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    out_row,
    out_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    POWER: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PIPELINED: tl.constexpr,
):
    # The last rows look at most: they go first, so that no long tile is left when all others are done.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, POWER)
    kept = (row < rows)[:, None] & (dim < DIM)[None, :]
    place = row[:, None].to(tl.int64)
    limit = tl.load(positions + row, mask=row < rows, other=-1)
    query = tl.load(queries + place * query_row + head * query_head + dim[None, :], mask=kept, other=0.0)
    keys += head // GROUP * key_head
    values += head // GROUP * value_head
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    found = tl.full([ROWS, POWER], 0.0, tl.float32)
    stop = (tl.max(limit) + 1).to(tl.int32)
    if PIPELINED:
        for first in tl.range(0, stop, TOKENS):
            most, total, found = _look(
                first, stop, query, limit, keys, values, key_row, value_row, scale, most, total, found, DIM, TOKENS
            )
    else:  # the interpreter cannot make a range of tensors with numpy 2.4
        first = stop * 0
        while first < stop:
            most, total, found = _look(
                first, stop, query, limit, keys, values, key_row, value_row, scale, most, total, found, DIM, TOKENS
            )
            first += TOKENS
    found = found / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + place * out_row + head * out_head + dim[None, :], found.to(out.dtype.element_ty), mask=kept)


def attend(queries: Any, keys: Any, values: Any, positions: Any, scale: float) -> Any:
    """As `attention.attend`, on the current stream. Tensors [rows or tokens, heads, dim], their last dim packed."""
    rows, heads, dim = queries.shape
    out = queries.new_empty(rows, heads, dim)
    small = queries.element_size() > 2
    block = _ROWS // 4 if small else _ROWS
    _attend[(triton.cdiv(rows, block), heads)](
        queries,
        keys,
        values,
        positions,
        out,
        rows,
        scale * _LOG2_E,
        *queries.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        *out.stride()[:2],
        GROUP=heads // keys.shape[1],
        DIM=dim,
        POWER=max(16, triton.next_power_of_2(dim)),
        ROWS=block,
        TOKENS=_TOKENS // 2 if small else _TOKENS,
        PIPELINED=queries.is_cuda,
        num_warps=4 if small else 8,
        num_stages=2 if small else 3,
    )
    return out
