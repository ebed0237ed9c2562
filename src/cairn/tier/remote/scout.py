"""How much of a chain a store has: asked in at most two round trips, and remembered."""

import threading
import time
from typing import Final

from cairn.kv import Keys
from cairn.kv.keys import KEY_BYTES
from cairn.observe.reasons import Reason
from cairn.tier.breaker import Breaker
from cairn.tier.known import Known
from cairn.tier.pace import Pace
from cairn.tier.remote.base import ObjectStore
from cairn.tier.remote.packing import Packing, Span

#: An answer that took less than this is not late by the store's fault.
FAIR_S: Final = 0.02


class Scout:
    """Knows and asks which objects of a chain are there.

    The first round trip asks about all whole objects of the chain and about what may end it; if not all are there, a
    second one asks which object of fewer blocks follows the last that is. Of more objects than a store answers for at a
    time the first round trip asks a sample, and the second those between: a gap in what the sample found then shows
    only when it is read, as a miss. Thread-safe.
    """

    def __init__(self, store: ObjectStore, packing: Packing, breaker: Breaker, known: Known[bool]) -> None:
        self._store = store
        self._packing = packing
        self._breaker = breaker
        self._known = known
        self._lock = threading.Lock()
        self.pace = Pace()
        self.lookups = 0
        self.round_trips = 0

    def match(self, keys: Keys) -> int:
        """How many leading blocks of the chain are in objects known to be there. Asks nobody."""
        chain, now = _Chain(keys), self._known.now()
        at = self._wholes(chain, now) * self._packing.blocks
        # The last group may end in an object of any size.
        for end in range(min(at + self._packing.blocks, len(keys)), at, -1):
            if self._known.get(chain.end(end), now):
                return end
        return at

    def settled(self, keys: Keys) -> bool:
        """Whether asking would say nothing new now."""
        return not self._question(_Chain(keys), again=False)

    def covering(self, keys: Keys, block: int) -> Span | None:
        """The largest object known to be there that holds a block of the chain."""
        start = block // self._packing.blocks * self._packing.blocks
        for end in range(min(start + self._packing.blocks, len(keys)), block, -1):
            if self._known.get(keys[end - 1].tobytes()):
                return Span(start, end)
        return None

    def ask(self, keys: Keys, deadline: float) -> Reason | None:
        """Finds out how much of the chain is there; `match` then says it. None, or why it could not."""
        chain = _Chain(keys)
        with self._lock:
            self.lookups += 1
        for again in (False, True):
            names = self._question(chain, again=again)
            if not names:
                return None
            limit = self._store.probe_names
            sample = [names[i * (len(names) - 1) // (limit - 1)] for i in range(limit)] if len(names) > limit else names
            reason = self.exists(sample, deadline)
            if reason is not None:
                return reason
            if sample is not names:
                self._infer(names, sample)
        return None

    def exists(self, ends: list[bytes], deadline: float) -> Reason | None:
        """Asks about objects by the keys of their last blocks, in one round trip."""
        if not self._breaker.allow():
            return Reason.BREAKER_OPEN
        with self._lock:
            self.round_trips += 1
        begun = time.monotonic()
        answer = self._store.exists([self._packing.name(end) for end in ends], deadline=deadline)
        if isinstance(answer, Reason):
            if answer is not Reason.TIMEOUT or deadline - begun > FAIR_S:
                self._breaker.failure()
            return answer
        self._breaker.success()
        self.pace.took(time.monotonic() - begun)
        self._known.note((end for end, there in zip(ends, answer, strict=True) if there), True)
        self._known.note((end for end, there in zip(ends, answer, strict=True) if not there), False)
        return None

    def _wholes(self, chain: "_Chain", now: float) -> int:
        """How many leading whole objects of the chain are known to be there."""
        step, count = self._packing.blocks, 0
        while (count + 1) * step <= len(chain) and self._known.get(chain.end((count + 1) * step), now):
            count += 1
        return count

    def _question(self, chain: "_Chain", *, again: bool) -> list[bytes]:
        """About which objects to ask: whole ones up to the first that is not there, then what may follow the last.

        again: in the second round trip what may follow is asked for wherever the last may turn out to be.
        """
        step, now = self._packing.blocks, self._known.now()
        stop = first = self._wholes(chain, now)
        names = []
        while (stop + 1) * step <= len(chain):
            end = chain.end((stop + 1) * step)
            there = self._known.get(end, now)
            if there is False:
                break
            if there is None:
                names.append(end)
            stop += 1
        tails = [end for group in range(first if again else stop, stop + 1) for end in self._tails(chain, group, now)]
        return names + tails if len(names) + len(tails) <= self._store.probe_names else names or tails

    def _tails(self, chain: "_Chain", group: int, now: float) -> list[bytes]:
        """Objects of a group that are not whole and larger than any known to be there."""
        tails = []
        start = group * self._packing.blocks
        for end in range(min(start + self._packing.blocks - 1, len(chain)), start, -1):
            there = self._known.get(chain.end(end), now)
            if there:
                break
            if there is None:
                tails.append(chain.end(end))
        return tails

    def _infer(self, names: list[bytes], sample: list[bytes]) -> None:
        """What the sample says of the objects between: those before one that is there are taken to be there."""
        there = [self._known.get(end) for end in sample]
        count = there.index(False) if False in there else len(there)
        if count:
            self._known.note(names[: names.index(sample[count - 1])], True)


class _Chain:
    """The keys of a chain, cut into bytes only where somebody looks: a step of the engine waits for it."""

    def __init__(self, keys: Keys) -> None:
        self._bytes = keys.tobytes()
        self._length = len(keys)

    def __len__(self) -> int:
        return self._length

    def end(self, stop: int) -> bytes:
        """The key of the last block before `stop`."""
        return self._bytes[(stop - 1) * KEY_BYTES : stop * KEY_BYTES]
