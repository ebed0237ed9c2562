"""What the service saw of requests lately: counted when a request ends, in a few microseconds, and bounded."""

import random
from collections import deque
from collections.abc import Mapping, Set
from typing import Final, NamedTuple

from cairn.serve.dashboard.base import Served

#: Prompts remembered, and bytes of each one's beginning.
_RECENT: Final = 256
BEGINNING: Final = 16 << 10
#: Of a period: a copy of each would cost a busy service too much.
_NEW: Final = 64
#: TTFTs kept of a period, and quantiles told of them.
_KEPT: Final = 512
_QUANTILES: Final = 8


class Recent(NamedTuple):
    """A prompt. beginning: of its JSON, of which there were `size` bytes in all. held: tokens of it, by instance and
    tier, when it was sent to `instance`.
    """

    beginning: bytes
    size: int
    tokens: int
    held: Mapping[str, Mapping[str, int]]
    instance: str


class _Times:
    """A fair choice of the times of a period."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[float] = []

    def add(self, seconds: float) -> None:
        self.count += 1
        if len(self._kept) < _KEPT:
            self._kept.append(seconds)
        elif (place := random.randrange(self.count)) < _KEPT:
            self._kept[place] = seconds

    def quantiles(self) -> list[float]:
        """Evenly spaced; all of them, if they are few."""
        times, many = sorted(self._kept), min(len(self._kept), _QUANTILES)
        return [round(times[int((i + 0.5) * len(times) / many)], 5) for i in range(many)]


class Traffic:
    """For one event loop. answered, failed: requests. hits, misses: tokens that the router expected, by instance (and
    tier).
    """

    def __init__(self) -> None:
        self.answered = self.failed = 0
        self.recent: deque[Recent] = deque(maxlen=_RECENT)
        self.hits: dict[str, dict[str, float]] = {}
        self.misses: dict[str, float] = {}
        self._cold, self._hit = _Times(), _Times()
        self._new = 0

    def remember(self, recent: Recent) -> None:
        self._new += 1
        self.recent.append(recent)

    def answered_at(self, instance: str, tokens: int, held: Mapping[str, int], ttft_s: float | None) -> bool:
        """Counts a request. tokens: of its prompt. held: of them, there, by tier. ttft_s: None: it was no stream. Gives
        whether the prompt is to be remembered: the first ones of each period are.
        """
        self.answered += 1
        hits, hit = self.hits.get(instance), 0
        if hits is None:
            hits = self.hits[instance] = {}
        for tier, count in held.items():
            hits[tier] = hits.get(tier, 0) + count
            hit += count
        missed = tokens - hit if tokens > hit else 0
        self.misses[instance] = self.misses.get(instance, 0) + missed
        if ttft_s is not None:
            (self._hit if 2 * hit >= tokens else self._cold).add(ttft_s)
        return self._new < _NEW

    def keep(self, instances: Set[str]) -> None:
        """Of all others what was expected is forgotten."""
        for name in self.misses.keys() - instances:
            del self.hits[name], self.misses[name]

    def served(self) -> Served:
        """Since the last call."""
        cold, hit, self._new = self._cold, self._hit, 0
        self._cold, self._hit = _Times(), _Times()
        return Served(cold.count, hit.count, cold.quantiles(), hit.quantiles())
