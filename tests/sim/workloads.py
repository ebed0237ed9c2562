"""Synthetic request patterns, against which a policy that learns must never be worse than LRU."""

import heapq
from collections.abc import Callable, Iterator

import numpy as np

from cairn.sim.trace import Trace

Chain = list[int]


class _Ids:
    """Fresh block ids, as many as asked for."""

    def __init__(self) -> None:
        self.next = 0

    def new(self, count: int) -> Chain:
        self.next += count
        return list(range(self.next - count, self.next))


def zipf(requests: int, seed: int, skew: float = 0.9, drift: bool = False) -> Iterator[tuple[float, Chain]]:
    """Documents of 1-16 blocks by Zipf's law; with `drift`, their popularity moves on all the time."""
    rng = np.random.default_rng(seed)
    ids = _Ids()
    documents = [ids.new(int(n)) for n in rng.integers(1, 17, 3000)]
    weights = 1 / np.arange(1, len(documents) + 1) ** skew
    picks = rng.choice(len(documents), requests, p=weights / weights.sum())
    for i, pick in enumerate(picks):
        yield float(i), documents[(int(pick) + (i // 8 if drift else 0)) % len(documents)]


def uniform(requests: int, seed: int) -> Iterator[tuple[float, Chain]]:
    rng = np.random.default_rng(seed)
    ids = _Ids()
    documents = [ids.new(8) for _ in range(2000)]
    for i, pick in enumerate(rng.integers(0, len(documents), requests)):
        yield float(i), documents[int(pick)]


def loop(requests: int, seed: int) -> Iterator[tuple[float, Chain]]:
    """The same documents over and over, more than fit: LRU hits nothing."""
    ids = _Ids()
    documents = [ids.new(8) for _ in range(250)]
    for i in range(requests):
        yield float(i), documents[i % len(documents)]


def scans(requests: int, seed: int) -> Iterator[tuple[float, Chain]]:
    """A working set, and now and then a run of long documents that never come again."""
    rng = np.random.default_rng(seed)
    ids = _Ids()
    hot = [ids.new(8) for _ in range(80)]
    for i in range(requests):
        scan = (i // 100) % 4 == 3
        yield float(i), ids.new(24) if scan else hot[int(rng.integers(0, len(hot)))]


def _chats(
    requests: int, seed: int, prompts: list[int], stay: float, think: Callable[[], float], ids: _Ids
) -> Iterator[tuple[float, Chain]]:
    rng = np.random.default_rng(seed)
    systems = [ids.new(n) for n in prompts]
    weights = 1 / np.arange(1, len(systems) + 1)
    arrivals = np.cumsum(rng.exponential(1.0, requests))
    queue: list[tuple[float, int, Chain]] = []
    for i, at in enumerate(arrivals):
        system = systems[int(rng.choice(len(systems), p=weights / weights.sum()))]
        heapq.heappush(queue, (float(at), i, system + ids.new(int(rng.geometric(0.12)))))
    for _ in range(requests):
        at, i, chain = heapq.heappop(queue)
        yield at, chain
        if rng.random() < stay:
            heapq.heappush(queue, (at + think(), i, chain + ids.new(int(rng.geometric(0.4)))))


def chats(requests: int, seed: int) -> Iterator[tuple[float, Chain]]:
    """Conversations of several turns, half a minute to some minutes apart; one short system prompt."""
    rng = np.random.default_rng(seed + 1)
    return _chats(requests, seed, [1], 0.6, lambda: float(rng.lognormal(4.3, 0.7)), _Ids())


def agents(requests: int, seed: int) -> Iterator[tuple[float, Chain]]:
    """Many tools with long system prompts, quick turns."""
    rng = np.random.default_rng(seed + 1)
    return _chats(
        requests, seed, [int(n) for n in rng.integers(2, 20, 60)], 0.7, lambda: float(rng.exponential(8)), _Ids()
    )


def regenerations(requests: int, seed: int) -> Iterator[tuple[float, Chain]]:
    """Prompts of which half are sent again within the next few requests, and then never."""
    rng = np.random.default_rng(seed)
    ids = _Ids()
    queue: list[tuple[float, int, Chain]] = [(float(i), i, ids.new(int(rng.integers(4, 40)))) for i in range(requests)]
    heapq.heapify(queue)
    for _ in range(requests):
        at, i, chain = heapq.heappop(queue)
        yield at, chain
        if rng.random() < 0.5:
            heapq.heappush(queue, (at + float(rng.exponential(6)), i, chain))


def phases(requests: int, seed: int) -> Iterator[tuple[float, Chain]]:
    """One pattern for a while, then another: what was learned from the first is wrong for the second."""
    parts = [chats, zipf, regenerations, agents]
    share = requests // len(parts)
    start, offset = 0.0, 0
    for part in parts:
        top = offset
        for at, chain in part(share, seed):
            top = max(top, offset + max(chain) + 1)
            yield start + at, [offset + block for block in chain]
        offset, start = top, start + 1e5


WORKLOADS: dict[str, Callable[[int, int], Iterator[tuple[float, Chain]]]] = {
    "zipf": zipf,
    "zipf, drifting": lambda requests, seed: zipf(requests, seed, drift=True),
    "zipf, flat": lambda requests, seed: zipf(requests, seed, skew=0.6),
    "uniform": uniform,
    "loop": loop,
    "scans": scans,
    "chats": chats,
    "agents": agents,
    "regenerations": regenerations,
    "phases": phases,
}


def trace_of(workload: str, requests: int, seed: int = 0) -> Trace:
    rows = list(WORKLOADS[workload](requests, seed))
    return Trace.of([at for at, _ in rows], [chain for _, chain in rows])
