"""Belady's bound: what a cache would hit that knows the future."""

import heapq

import numpy as np
import numpy.typing as npt

from cairn.sim.trace import Trace

NEVER = 1 << 62


def next_uses(trace: Trace) -> npt.NDArray[np.int64]:
    """For each block use, the index of the same block's next use in `trace.blocks`, or NEVER."""
    uses = np.full(trace.block_uses, NEVER, np.int64)
    order = np.argsort(trace.blocks, kind="stable")
    same = trace.blocks[order[1:]] == trace.blocks[order[:-1]]
    uses[order[:-1][same]] = order[1:][same]
    return uses


def belady(trace: Trace, capacity: int) -> npt.NDArray[np.int64]:
    """Leading blocks hit by each request under the clairvoyant rule (Belady 1966): evict what is used furthest in the
    future.

    Bypass is allowed: a request uses all its blocks, then blocks go until `capacity` are left, and those may be its
    own, so a block that never comes back takes no room. The tier is prefix-closed without further rules, because a
    chain's later blocks are used later, and so go first. No policy that obeys `PrefixIndex` can hit more.
    """
    following = next_uses(trace).tolist()
    blocks = trace.blocks.tolist()
    hits = np.zeros(len(trace), np.int64)
    resident: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    for i in range(len(trace)):
        first, last = int(trace.starts[i]), int(trace.starts[i + 1])
        leading = first
        while leading < last and blocks[leading] in resident:
            leading += 1
        hits[i] = leading - first
        for at in range(first, last):
            resident[blocks[at]] = following[at]
            heapq.heappush(furthest, (-following[at], blocks[at]))
        while len(resident) > capacity:
            use, block = heapq.heappop(furthest)
            # An entry counts only if the block has not been used since it was pushed.
            if resident.get(block) == -use:
                del resident[block]
    return hits
