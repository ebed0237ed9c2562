"""The contract between the engine and where its blocks live: in this process, or in the host's node."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future
from typing import NamedTuple

from cairn.engine.hold import Hold
from cairn.engine.writing import Writing
from cairn.index.journal import JournalReader
from cairn.kv import Keys


class Held(NamedTuple):
    """How many leading blocks of a chain are held: `dram` in DRAM; below: in each lower tier or those above it up to
    DRAM, by its name, from the fastest on; vram: in VRAM, own or a peer's, as far as this engine can read it.

    own: in the VRAM that this engine writes to; None: it writes to DRAM.
    """

    dram: int
    below: tuple[tuple[str, int], ...] = ()
    vram: int = 0
    own: int | None = None

    @property
    def total(self) -> int:
        """In any tier."""
        return max(self.vram, self.below[-1][1] if self.below else self.dram)

    @property
    def stored(self) -> int:
        """Those that a write would find in their place."""
        return self.dram if self.own is None else self.own


class BlockStore(ABC):
    """Blocks by key; their bytes are touched in DRAM rows alone, or in VRAM where an engine has some (`VramStore`).

    Two-phase writes go through a `Writing`, reads through a `Hold`; both give access to the arena. Keys are those of a
    chain from its first block on, uint64 [n, 2]. Thread-safe; nothing here raises for what happens inside.
    """

    asks: bool
    """Whether `match` may not know all, so that `ask` may have something to find out."""

    @abstractmethod
    def match(self, keys: Keys) -> Held:
        """What is held as far as it is known, without touching anything or waiting."""

    @abstractmethod
    def ask(self, keys: Keys, *, deadline: float, worth_s: float) -> "Future[None] | None":
        """Finds out in the background what `match` does not know; None if it knows all. See `Tier.ask`."""

    def find(self, keys: Keys, *, briefly: bool = False) -> tuple[Held, Hold | None]:  # noqa: ARG002 - the contract
        """As `match`; and where that took a hold on all of them (VRAM has them), this, which is the caller's then.

        briefly: he copies at once, and gives it back: what is evicted until then need not be kept for him.
        """
        return self.match(keys), None

    @abstractmethod
    def hold(self, keys: Keys, *, deadline: float) -> Hold:
        """Pins the leading blocks and starts to bring up those that are not in DRAM. Returns at once."""

    def hold_dram(self, keys: Keys, *, deadline: float) -> Hold:
        """As `hold`, and all of it in DRAM, whatever VRAM has."""
        return self.hold(keys, deadline=deadline)

    @abstractmethod
    def write(self, keys: Keys, *, namespace: bytes) -> Writing:
        """Rows for the blocks of a chain that DRAM lacks, as many as can be had; counts a use of those it has."""

    @abstractmethod
    def watch(self) -> Mapping[str, JournalReader]:
        """A journal a tier, by its name, for one reader as long as the store lives; see `cairn.index.journal`."""

    @abstractmethod
    def flush(self, timeout: float) -> bool:
        """Waits until all that is committed is durable, as far as lower tiers admit it; False if it was not in time."""

    @abstractmethod
    def close(self, timeout: float) -> None:
        """Flushes within `timeout` and gives everything back. Idempotent."""
