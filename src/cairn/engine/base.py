"""The contract between the engine and where its blocks live: in this process, or (later) in the host's node."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.engine.hold import Hold
from cairn.engine.writing import Writing
from cairn.kv import Keys


class Held(NamedTuple):
    """How many leading blocks of a chain are held: `dram` in DRAM, `total` in any tier."""

    dram: int
    total: int


class BlockStore(ABC):
    """Blocks by key, with DRAM rows as the only place where their bytes are touched.

    Two-phase writes: `reserve` rows, fill them, `commit` (or `abort`). Reads go through a `Hold`. Keys are those of a
    chain from its first block on, uint64 [n, 2]. Thread-safe; nothing here raises for what happens inside.
    """

    memory: npt.NDArray[np.uint8]
    """The arena, uint8 [rows, stride]; a row is touched only by who writes or holds it."""

    @abstractmethod
    def match(self, keys: Keys) -> Held:
        """What is held, without touching anything."""

    @abstractmethod
    def hold(self, keys: Keys, *, deadline: float) -> Hold:
        """Pins the leading blocks and starts to bring up those that are not in DRAM. Returns at once."""

    @abstractmethod
    def write(self, keys: Keys, *, namespace: bytes) -> Writing:
        """Rows for the blocks of a chain that DRAM lacks, as many as can be had; counts a use of those it has."""

    @abstractmethod
    def flush(self, timeout: float) -> bool:
        """Waits until all that is committed is durable, as far as lower tiers admit it; False if it was not in time."""

    @abstractmethod
    def close(self, timeout: float) -> None:
        """Flushes within `timeout` and gives everything back. Idempotent."""
