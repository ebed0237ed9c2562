"""The history of what is shown, and one snapshot of it for all who look."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Self

import msgspec

from cairn import __version__
from cairn.serve.dashboard.base import PERIOD_S, SAMPLES, Counts, Reading, Sample, Source, State

#: Instances that are sent; of more only the number is.
_INSTANCES: Final = 256
#: Periods over which an instance's hit rate is told.
_WINDOW: Final = int(60 / PERIOD_S)


class Figures(NamedTuple):
    """Tokens of prompts in a period: asked for, and hit."""

    asked: float
    hit: float


class Board:
    """Samples a source, and tells its state. For one event loop or thread.

    A period costs a reading, whether or not anybody looks; the state is put together at most once a period, when it is
    asked for, and its bytes are the same for everybody who asks.
    """

    def __init__(self, source: Source, clock: Callable[[], float] = time.time) -> None:
        """clock: seconds since the epoch."""
        self._source, self._clock = source, clock
        self._started = clock()
        self._samples: deque[msgspec.Raw] = deque(maxlen=SAMPLES)
        self._seq = 0
        self._before = source.read()
        self._rates: dict[str, deque[Figures]] = {}
        self._state: State | None = None
        self._told: dict[int, bytes] = {}

    async def __aenter__(self) -> Self:
        """From now on it samples."""
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            await asyncio.to_thread(self._source.look)
            self.sample()

    def sample(self) -> None:
        """Takes the period that ends now into the history."""
        now = self._source.read()
        self._samples.append(msgspec.Raw(msgspec.json.encode(self._difference(now, self._before))))
        self._before = now
        self._seq += 1
        self._state = None
        self._told.clear()

    def state(self, since: int = -1) -> bytes:
        """A `State` in JSON, with the samples that came after number `since`."""
        first = min(max(since, self._seq - len(self._samples)), self._seq)
        if first not in self._told:
            state = self._state = self._state or self._put_together()
            samples = list(self._samples)
            state.samples = samples[len(samples) - (self._seq - first) :]
            self._told[first] = msgspec.json.encode(state)
        return self._told[first]

    def _put_together(self) -> State:
        source = self._source
        instances = source.instances()
        for one in instances:
            one.hit_rate = self._rate(one.name)
        hot, prompts = source.hot()
        return State(
            kind=source.kind,
            name=source.name,
            version=__version__,
            started=self._started,
            time=self._clock(),
            seq=self._seq,
            instances=instances[:_INSTANCES],
            more_instances=max(0, len(instances) - _INSTANCES),
            tiers=source.tiers(),
            hot=hot,
            prompts=prompts,
            samples=[],
        )

    def _difference(self, now: Reading, before: Reading) -> Sample:
        total, asked = Counts({}, {}, {}, {}), dict[str, Figures]()
        for life, counts in now.counts.items():
            # Of a life that is new to us it is not known when it has counted what it tells at first.
            grown = [*map(_grown, counts, before.counts.get(life, counts))]
            for amounts, more in zip(total, grown, strict=True):
                for label, amount in more.items():
                    amounts[label] = amounts.get(label, 0) + amount
            hit, missed = sum(grown[0].values()), sum(grown[1].values())
            others = asked.get(life[0], Figures(0, 0))
            asked[life[0]] = Figures(others.asked + hit + missed, others.hit + hit)
        self._remember(asked)
        return Sample(
            t=round(self._clock(), 3),
            requests=now.requests - before.requests,
            failures=now.failures - before.failures,
            running=now.running,
            waiting=now.waiting,
            **total._asdict(),
            **now.served._asdict(),
        )

    def _remember(self, asked: Mapping[str, Figures]) -> None:
        for name in self._rates.keys() - asked.keys():
            del self._rates[name]
        for name, figures in asked.items():
            self._rates.setdefault(name, deque(maxlen=_WINDOW)).append(figures)

    def _rate(self, name: str) -> float | None:
        """An instance's hit rate in the last minute."""
        figures = self._rates.get(name, ())
        asked = sum(one.asked for one in figures)
        return sum(one.hit for one in figures) / asked if asked else None


def _grown(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """By how much each amount has grown; one that went back has begun anew."""
    differences = ((label, amount, amount - before.get(label, 0)) for label, amount in now.items())
    return {label: more if more >= 0 else amount for label, amount, more in differences if more}
