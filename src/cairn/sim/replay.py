"""Replays a trace against one tier, without a clock: nobody waits, and what is stored is there at once."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.index import EvictionPolicy
from cairn.sim.tiers import Tier
from cairn.sim.trace import Trace


class Replay(NamedTuple):
    """What a replay counted."""

    hits: npt.NDArray[np.int64]  # [requests]: leading blocks that were resident when the request came
    evicted: int

    @property
    def hit_blocks(self) -> int:
        return int(self.hits.sum())


def replay(trace: Trace, capacity: int, policy: type[EvictionPolicy], chunk: int = 16) -> Replay:
    """Each request uses its leading resident blocks, then stores the others (`Tier.use`), in the order of the trace."""
    tier = Tier("dram", capacity, policy)
    hits = [tier.use(trace.chain(i), float(now), chunk) for i, now in enumerate(trace.times)]
    return Replay(np.array(hits, np.int64), tier.index.evicted)
