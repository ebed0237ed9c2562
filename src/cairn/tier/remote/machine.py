"""What reads and writes of the remote tier work with."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from cairn.observe.reasons import Reason
from cairn.tier.breaker import Breaker
from cairn.tier.flights import Batch
from cairn.tier.known import Known
from cairn.tier.remote.base import ObjectStore
from cairn.tier.remote.packing import Packing
from cairn.tier.remote.scout import FAIR_S, Scout
from cairn.tier.remote.share import Share
from cairn.tier.remote.streams import Streams
from cairn.tier.tally import Tally

#: Called when a batch is done.
OnDone = Callable[[Batch], None]


@dataclass(frozen=True, slots=True)
class Machine:
    """timeout_s: what one operation on the store may take. write_breaker: opens while the store takes nothing more.
    streams: where objects are compressed.
    """

    store: ObjectStore
    packing: Packing
    known: Known[bool]
    scout: Scout
    breaker: Breaker
    write_breaker: Breaker
    share: Share
    tally: Tally
    timeout_s: float
    streams: Streams | None = None

    @property
    def together(self) -> int:
        """So many objects are moved by one call. What is computed for each costs a multiple where the bytes of the one
        before have taken the cache, and some stores are asked once for all."""
        if self.streams:
            return 1
        return self.store.together(self.packing.blocks * self.packing.block_bytes)

    def deadline(self, limit: float) -> float:
        """The moment by which an operation that begins now must end, `limit` at the latest."""
        return min(limit, time.monotonic() + self.timeout_s)

    def judge(self, answer: "int | Reason | None", deadline: float, begun: float) -> None:
        """Tells the breaker how the store did."""
        if answer is Reason.TIMEOUT:
            if deadline - begun > FAIR_S:
                self.breaker.failure()
        elif answer is Reason.IO_ERROR:
            self.breaker.failure()
        else:
            self.breaker.success()
