"""Which runs of bytes a copy consists of: without a GPU, so that the planning can be tested where there is none."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.copy.paged import PagedKV, TokenSlots
from cairn.jit import kernel
from cairn.kv import KVGeometry

Addresses = npt.NDArray[np.int64]


class Pieces(NamedTuple):
    """Runs of bytes, one entry each: int64 [n] addresses in the paged cache and in the rows, and bytes."""

    outside: Addresses
    inside: Addresses
    sizes: Addresses


def merge(outside: Addresses, inside: Addresses, sizes: Addresses) -> Pieces:
    """Joins neighbours of the list that stand one behind the other on both sides. Arrays: int64 [n]."""
    if not len(sizes):
        return Pieces(outside, inside, sizes)
    apart = (outside[1:] != outside[:-1] + sizes[:-1]) | (inside[1:] != inside[:-1] + sizes[:-1])
    starts = np.concatenate([[0], np.flatnonzero(apart) + 1])
    return Pieces(outside[starts], inside[starts], np.add.reduceat(sizes, starts))


def vector_shape(kv: PagedKV, geometry: KVGeometry) -> tuple[int, int]:
    """(heads, bytes a head) of a token in one plane. Opaque pages: as if one head held all of a layer's bytes."""
    if kv.opaque:
        return 1, geometry.layer_bytes // geometry.block_tokens
    return geometry.kv_heads, geometry.head_dim * geometry.element_bytes


def token_runs(kv: PagedKV, slots: TokenSlots, row_starts: Addresses, geometry: KVGeometry) -> Pieces:
    """Runs of one plane: `outside` relative to the plane's base, `inside` at `row_starts` (int64 [n]) + place in it.

    slots: int64 [n * block_tokens]; negative ones are left out.
    """
    heads, head_bytes = vector_shape(kv, geometry)
    vector = heads * head_bytes
    packed = kv.token_stride == vector and (heads == 1 or kv.head_stride == head_bytes)
    if packed and (starts := _whole_runs(kv, slots, geometry.block_tokens)) is not None:
        outside = starts // kv.page_tokens * kv.page_stride + starts % kv.page_tokens * kv.token_stride
        return merge(outside, row_starts, np.full(len(starts), geometry.block_tokens * vector, np.int64))
    tokens = np.arange(geometry.block_tokens, dtype=np.int64) * vector
    inside = (row_starts[:, None] + tokens).reshape(-1)
    kept = slots >= 0
    slots, inside = slots[kept], inside[kept]
    outside = slots // kv.page_tokens * kv.page_stride + slots % kv.page_tokens * kv.token_stride
    if heads > 1 and kv.head_stride != head_bytes:
        head = np.arange(heads, dtype=np.int64)
        outside = (outside[:, None] + head * kv.head_stride).reshape(-1)
        inside = (inside[:, None] + head * head_bytes).reshape(-1)
        vector = head_bytes
    return merge(outside, inside, np.full(len(outside), vector, np.int64))


def _whole_runs(kv: PagedKV, slots: TokenSlots, block_tokens: int) -> TokenSlots | None:
    """The first slot of each block, if every block lies in one run inside a page: spares arrays a token long."""
    blocks = slots.reshape(-1, block_tokens)
    starts = blocks[:, 0]
    inside = (starts >= 0) & (starts % kv.page_tokens <= kv.page_tokens - block_tokens)
    in_order = (blocks[:, 1:] == blocks[:, :-1] + 1).all()
    return starts if in_order and inside.all() else None


def _one_run(bases: Addresses, plane_bytes: int) -> bool:
    """Whether planes stand one behind the other in every page."""
    return bool((np.diff(bases.reshape(-1)) == plane_bytes).all())


def plan(kv: PagedKV, slots: TokenSlots, row_starts: Addresses, layers: range, geometry: KVGeometry) -> Pieces:
    """All pieces of a copy, neighbours joined. row_starts: int64 [n], the addresses of the rows."""
    runs = token_runs(kv, slots, row_starts, geometry)
    bases = kv.bases[layers.start : layers.stop]
    heads, head_bytes = vector_shape(kv, geometry)
    plane_bytes = geometry.block_tokens * heads * head_bytes
    first = layers.start * bases.shape[1]
    if bases.size and (runs.sizes == plane_bytes).all() and _one_run(bases, plane_bytes):
        # Blocks that stand in one run on both sides, as they do in cross-layer pages: all planes as if they were one.
        whole = np.full(len(runs.sizes), bases.size * plane_bytes, np.int64)
        return merge(runs.outside + bases[0, 0], runs.inside + first * plane_bytes, whole)
    planes = np.arange(bases.size, dtype=np.int64) + first
    shape = (len(runs.sizes), bases.size)
    outside = (runs.outside[:, None] + bases.reshape(-1)).reshape(-1)
    inside = (runs.inside[:, None] + planes * plane_bytes).reshape(-1)
    return merge(outside, inside, np.broadcast_to(runs.sizes[:, None], shape).reshape(-1))


@kernel
def _whole_blocks(
    bases: Addresses,
    plane_bytes: int,
    page_tokens: int,
    page_stride: int,
    token_stride: int,
    limit: int,
    aligned: int,
    slots: TokenSlots,
    block_tokens: int,
    memory: int,
    row_stride: int,
    rows: npt.NDArray[np.int32],
    pieces: npt.NDArray[np.int64],
) -> bool:
    for i in range(1, len(bases)):
        if bases[i] != bases[i - 1] + plane_bytes:
            return False
    for i in range(len(rows)):
        first, apart = slots[i * block_tokens], 0
        for t in range(block_tokens):
            apart |= slots[i * block_tokens + t] - first - t
        page = first // page_tokens
        place = first - page * page_tokens
        if apart or first < 0 or first + block_tokens > limit or place + block_tokens > page_tokens:
            return False
        if aligned > 1 and first % aligned:
            return False
        pieces[0, i] = bases[0] + page * page_stride + place * token_stride
        pieces[1, i] = memory + np.int64(rows[i]) * row_stride
        pieces[2, i] = len(bases) * plane_bytes
    return True


def whole_blocks(
    kv: PagedKV,
    slots: TokenSlots,
    memory: tuple[int, int],
    rows: npt.NDArray[np.int32],
    layers: range,
    geometry: KVGeometry,
) -> Pieces | None:
    """One piece a block, where each block is one run of bytes on both sides and inside the cache; else None.

    What `plan` says before it joins neighbours, and `check_slots`, in one pass: code that runs now and then has left
    the caches, and each of numpy's functions costs 10 us then. memory: address and stride of the rows, int32 [n].
    slots: int64 [n * block_tokens]. Both contiguous.
    """
    heads, head_bytes = vector_shape(kv, geometry)
    vector, bases = heads * head_bytes, kv.bases[layers.start : layers.stop].reshape(-1)
    if kv.token_stride != vector or (heads > 1 and kv.head_stride != head_bytes) or not len(bases):
        return None
    tokens = geometry.block_tokens
    first = memory[0] + layers.start * kv.bases.shape[1] * tokens * vector
    place = (tokens * vector, kv.page_tokens, kv.page_stride, kv.token_stride, kv.slots, tokens if kv.opaque else 1)
    pieces = np.empty((3, len(rows)), np.int64)
    found = _whole_blocks(bases, *place, slots, tokens, first, memory[1], rows, pieces)
    return Pieces(pieces[0], pieces[1], pieces[2]) if found else None


def piece_bytes(kv: PagedKV, slots: TokenSlots, layers: range, geometry: KVGeometry) -> int:
    """How long the pieces of a copy between rows that do not touch are, judged by its first block: requests are alike
    all along, and to plan them takes a hundred times as long.
    """
    heads, head_bytes = vector_shape(kv, geometry)
    vector = heads * head_bytes
    if heads > 1 and kv.head_stride != head_bytes:
        return head_bytes
    tokens = min(geometry.block_tokens, kv.page_tokens)
    first = slots[:tokens]
    if kv.token_stride != vector or first[0] < 0 or first[-1] - first[0] != tokens - 1:
        return vector
    if tokens < geometry.block_tokens:
        return tokens * vector
    bases = kv.bases[layers.start : layers.stop].reshape(-1)
    apart = np.flatnonzero(np.diff(bases) != tokens * vector)
    return tokens * vector * (int(apart[0]) + 1 if len(apart) else len(bases))


def word_bytes(kv: PagedKV, row_starts: Addresses, geometry: KVGeometry) -> int:
    """The widest word, 8 bytes at most, that every address and every piece of a copy is a multiple of."""
    _, head_bytes = vector_shape(kv, geometry)
    numbers = [head_bytes, kv.page_stride, kv.token_stride, kv.head_stride, *kv.bases.reshape(-1).tolist()]
    bits = int(np.bitwise_or.reduce(np.array(numbers, np.int64))) | int(np.bitwise_or.reduce(row_starts, initial=0))
    return min(8, bits & -bits or 8)
