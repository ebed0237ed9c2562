"""Kinds of blocks: what a request tells about when its blocks will be asked for again.

A block asked for once is known by the request that brought it: what its new part hangs from (nothing, a block new as
well, one used twice, ... a system prompt used by everybody), how much of the request was new (the next turn of a chat
adds little, a new document is all new), and whether the block was the request's last one (often a ragged end that no
later request repeats). A block asked for again is known by how often, by the mean time between its uses, and by how
much its last request added to it. All measures are relative: to the request's length, or to the cache's capacity.
"""

import math

from cairn.jit import kernel

LEVELS = 8  # of use counts: 1, 2, 3, 4-5, 6-7, 8-11, 12-15, 16 and more
PACES = 8  # of the mean time between uses: below half the capacity, then octaves
SHARES = 3  # new part of a request: under an eighth, under a half, more
FRESH_KINDS = (LEVELS + 1) * SHARES * 2
KINDS = FRESH_KINDS + (LEVELS - 1) * PACES * SHARES
assert KINDS <= 256


@kernel
def level_of(uses: int) -> int:
    if uses < 4:
        return max(0, uses - 1)
    return min(LEVELS - 1, int(2 * math.log2(uses)) - 1)


@kernel
def share_of(new: int, length: int) -> int:
    return 0 if 8 * new < length else 1 if 2 * new < length else 2


@kernel
def fresh_kind(origin: int, share: int, last: bool) -> int:
    """Of a block asked for once; `origin` is 0, or the level of the block that the new part hangs from, plus one."""
    return (origin * SHARES + share) * 2 + (1 if last else 0)


@kernel
def used_kind(uses: int, gap: float, share: int, unit: float) -> int:
    """Of a block asked for again; `unit` is the cache's capacity in blocks."""
    pace = min(PACES - 1, max(0, math.floor(math.log2((gap + 1) / unit)) + 2))
    return FRESH_KINDS + ((level_of(uses) - 1) * PACES + pace) * SHARES + share


@kernel
def group_of(kind: int) -> int:
    """The level of a kind: kinds with few samples borrow from their group."""
    return 0 if kind < FRESH_KINDS else 1 + (kind - FRESH_KINDS) // (PACES * SHARES)
