"""A simulated tier: the real index and policy, and how blocks come to be in it."""

import numpy as np

from cairn.index import EvictionPolicy, PrefixIndex
from cairn.index.slots import Keys


class Tier:
    """One tier below the KV cache. name: of `cairn.plan.schedule.base.TIERS`."""

    def __init__(self, name: str, blocks: int, policy: type[EvictionPolicy]) -> None:
        self.name = name
        self.index = PrefixIndex(blocks, policy)

    def use(self, keys: Keys, now: float, chunk: int = 0) -> int:
        """A request asks for the chain `keys`; what is missing of it is stored. Returns how many blocks were there.

        Missing blocks are stored `chunk` at a time, as an engine does that prefills in chunks; all at once with `chunk`
        0, and then nothing of the request can be evicted in its favour. Where a policy evicts the end of the very chain
        that is being stored, because that is worth less than all else, the rest of the chain is not stored.
        """
        held = self.index.touch(keys, now)
        self.store(keys, held, now, chunk)
        return held

    def store(self, keys: Keys, at: int, now: float, chunk: int = 0) -> None:
        """Stores keys[at:], as `use` says, without a use of what is there."""
        while at < len(keys):
            want = min(chunk or len(keys), len(keys) - at)
            stored = int(np.count_nonzero(self.index.commit(keys, at, self.index.reserve(want, now), now)))
            if stored < want:
                return
            at += stored
