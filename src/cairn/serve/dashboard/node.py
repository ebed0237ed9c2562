"""What the dashboard shows of a node: its pools, what their tiers hold, and what goes up and down below DRAM."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from cairn.node.server import Node, PoolFigures
from cairn.observe.http import JSON_HEADERS, Answer, Page
from cairn.serve.dashboard.base import PERIOD_S, Counts, InstanceShown, PrefixShown, Reading, Served, TierShown
from cairn.serve.dashboard.board import Board
from cairn.serve.dashboard.pages import since_of

_NOBODY: Final = Served(0, 0, [], [])


class NodeShown:
    """A `Source`: pools stand where a service has instances, `running` being their clients."""

    kind: Final = "node"

    def __init__(self, name: str, node: Node) -> None:
        self.name = name
        self._node = node
        self._pools: Mapping[str, PoolFigures] = {}

    def look(self) -> None:
        self._pools = self._node.pools()

    def read(self) -> Reading:
        pools = self._pools
        counts = {(name, ""): _counts(pool) for name, pool in pools.items()}
        return Reading(counts, _NOBODY, running=sum(pool.clients for pool in pools.values()))

    def instances(self) -> list[InstanceShown]:
        return [InstanceShown(name=name, running=pool.clients) for name, pool in self._pools.items()]

    def tiers(self) -> list[TierShown]:
        found: dict[str, TierShown] = {}
        for pool in self._pools.values():
            for tier, figures in pool.tiers.items():
                total = found.setdefault(tier, TierShown(tier=tier))
                total.capacity_bytes += int(figures.get("capacity_bytes", 0))
                blocks, room = figures.get("resident_blocks", 0), figures.get("capacity_blocks", 0)
                total.used_bytes += int(figures.get("capacity_bytes", 0) * blocks / room) if room else 0
                total.blocks += int(blocks)
        return [*found.values()]

    def hot(self) -> tuple[list[PrefixShown], int]:
        return [], 0


def _counts(pool: PoolFigures) -> Counts:
    """DRAM's clients copy by themselves, and tell the node nothing of it."""
    loads = {tier: figures["read_bytes"] for tier, figures in pool.tiers.items() if "read_bytes" in figures}
    stores = {tier: figures["written_bytes"] for tier, figures in pool.tiers.items() if "written_bytes" in figures}
    return Counts({}, {}, loads, stores)


@contextmanager
def state_page(source: NodeShown) -> Iterator[Page]:
    """What the page draws, sampled by a thread meanwhile."""
    board, lock, over = Board(source), threading.Lock(), threading.Event()

    def sample() -> None:
        while not over.wait(PERIOD_S):
            source.look()
            with lock:
                board.sample()

    def state(query: bytes) -> Answer:
        with lock:
            return Answer(JSON_HEADERS, board.state(since_of(query)))

    thread = threading.Thread(target=sample, name="cairn-dashboard", daemon=True)
    thread.start()
    try:
        yield state
    finally:
        over.set()
        thread.join()
