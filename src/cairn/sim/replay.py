"""Replays a trace against the real prefix index and an eviction policy."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.index import EvictionPolicy, PrefixIndex
from cairn.sim.trace import Trace


class Replay(NamedTuple):
    """What a replay counted."""

    hits: npt.NDArray[np.int64]  # [requests]: leading blocks that were resident when the request came
    evicted: int

    @property
    def hit_blocks(self) -> int:
        return int(self.hits.sum())


def replay(trace: Trace, capacity: int, policy: type[EvictionPolicy], chunk: int = 16) -> Replay:
    """Each request uses its leading resident blocks, then stores the others, in the order of the trace.

    Missing blocks are stored `chunk` at a time, as an engine does that prefills in chunks; all at once with `chunk`
    0, and then nothing of the request can be evicted in its favour. Where a policy evicts the end of the very chain
    that is being stored, because that is worth less than all else, the rest of the chain is not stored.
    """
    index = PrefixIndex(capacity, policy)
    hits = np.zeros(len(trace), np.int64)
    for i, (now, keys) in enumerate(trace.chains()):
        at = hits[i] = index.touch(keys, now)
        while at < len(keys):
            ids = index.reserve(min(chunk or len(keys), len(keys) - at), now)
            stored = int(np.count_nonzero(index.commit(keys, at, ids, now)))
            at += stored
            if stored == 0 or stored < len(ids):
                break
    return Replay(hits, index.evicted)
