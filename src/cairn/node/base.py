"""What the node needs of whoever keeps the blocks, and what a client learns of where they are."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cairn.config import Config
from cairn.index.journal import Journal
from cairn.kv import Keys, KVGeometry, Layout
from cairn.node.wire import VramPart
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.tier.arena import Arena
from cairn.tier.dram import DramTier

#: An arena, uint8 [rows, stride].
Memory = npt.NDArray[np.uint8]


class Home(NamedTuple):
    """Where rows are that other processes than their holder's shall touch (an engine's workers): the arena's name and
    shape, and the name of the gate that guards them (`cairn.node.gate`). None stands for the process's own arena.
    """

    arena: str
    slots: int
    stride: int
    gate: str


class VramHome(NamedTuple):
    """As `Home`, of rows in VRAM: the number of the donation they are of, the name of the gate that guards them, and
    what it takes to map the segment (without rows); None: it is the copying process's own.
    """

    donation: int
    gate: str
    part: VramPart | None


class HeldBlocks(Protocol):
    """How much of a chain is held: in DRAM, and in each lower tier or above it, by its name."""

    @property
    def dram(self) -> int: ...

    @property
    def below(self) -> tuple[tuple[str, int], ...]: ...


class PoolHold(Protocol):
    """Blocks pinned for a client: see `cairn.engine.hold`. progress: called when `ready` has grown or it settled."""

    ids: npt.NDArray[np.int32]
    resident: int
    ready: int
    reason: Reason | None
    progress: Callable[[], None] | None

    @property
    def settled(self) -> bool: ...

    def blocks_by_tier(self, start: int, stop: int) -> dict[str, int]: ...

    def abandon(self) -> None: ...

    def release(self) -> None: ...


class PoolWriting(Protocol):
    """Rows reserved for a client: see `cairn.engine.writing`."""

    first: int
    rows: npt.NDArray[np.int32]

    def commit(self, count: int) -> int: ...

    def end(self) -> None: ...


class PoolStore(Protocol):
    """DRAM and what is below it, for the blocks of one geometry: see `cairn.engine.local.LocalStore`."""

    asks: bool
    dram: DramTier

    def match(self, keys: Keys) -> HeldBlocks: ...

    def ask(self, keys: Keys, *, deadline: float, worth_s: float) -> "Future[None] | None": ...

    def hold(self, keys: Keys, *, deadline: float, use: bool = True) -> PoolHold: ...

    def used(self, keys: Keys) -> None: ...

    def write(self, keys: Keys, *, namespace: bytes) -> PoolWriting: ...

    def journal(self, tier: str) -> Journal | None: ...

    def flush(self, timeout: float) -> bool: ...

    def close(self, timeout: float) -> None: ...


class Opened(NamedTuple):
    """A store, and what it counts, its tiers' own figures included."""

    store: PoolStore
    metrics: Metrics


#: Opens the store of one pool: (configuration of the pool, geometry, layout of the rows, its arena). Raises CairnError.
OpenStore = Callable[[Config, KVGeometry, Layout, Arena], Opened]
