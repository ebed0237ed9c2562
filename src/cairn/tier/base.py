"""The contract of a tier below DRAM: a place that keeps KV blocks and moves them to and from rows of host memory."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future
from threading import Event
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.errors import InputError
from cairn.index.journal import Journal
from cairn.kv import Keys
from cairn.observe.reasons import Reason

#: What became of each block of a batch: None (done) or why not.
Outcomes = list[Reason | None]


class Rows(NamedTuple):
    """Rows of host memory that blocks are read into or written from.

    memory: uint8 [slots, stride], page-aligned (mmap) with a stride that is a multiple of 4096, so that it can be
    handed to O_DIRECT; ids: int32 [n], the row of each block. Whoever made it owns the memory and keeps these rows
    untouched by others until the transfer's future is done.
    """

    memory: npt.NDArray[np.uint8]
    ids: npt.NDArray[np.int32]


def check_span(keys: Keys, first: int, rows: Rows) -> None:
    """Raises InputError where blocks from `first` on, a row each, leave the chain, or their rows the memory."""
    if not 0 <= first <= first + len(rows.ids) <= len(keys):
        raise InputError(f"blocks {first}..{first + len(rows.ids)} of a chain of {len(keys)}: must lie within it")
    if len(rows.ids) and not 0 <= rows.ids.min() <= rows.ids.max() < len(rows.memory):
        raise InputError(f"rows {rows.ids.min()}..{rows.ids.max()} of {len(rows.memory)}: must lie within the memory")


class Tier(ABC):
    """Block storage with its own index, capacity and eviction; prefix-closed, as every tier is.

    Batch first and asynchronous: `read` and `write` return at once and never raise for what happens inside; the future
    always completes, with an outcome for each block, and from then on nothing touches the rows. A block that has not
    started when `deadline` (time.monotonic seconds) passes or `cancel` is set is left out with that reason; one that
    has started is finished first. All methods are thread-safe.
    """

    name: ClassVar[str]
    #: Blocks are moved in groups of so many, counted from the chain's first block, where that is possible.
    pack_blocks: int = 1

    @abstractmethod
    def match(self, keys: Keys) -> int:
        """How many leading blocks of the chain (uint64 [n, 2]) the tier holds; 0 while its breaker is open."""

    def ask(self, keys: Keys, *, deadline: float, worth_s: float = math.inf) -> "Future[None] | None":
        """Finds out what `match` cannot know by itself, in the background; None if there is nothing to find out, or if
        that would take longer than the `worth_s` seconds that knowing could save.

        The future is done, without a result, as soon as `match` says what is to be had; usually by the deadline, but
        whoever waits for it minds the deadline by himself.
        """
        return None

    @abstractmethod
    def read(
        self, keys: Keys, first: int, rows: Rows, *, deadline: float, cancel: Event | None = None
    ) -> "Future[Outcomes]":
        """Reads block first + i of the chain into row i. A block that is not proved right is not reported as read."""

    @abstractmethod
    def write(
        self, keys: Keys, first: int, rows: Rows, *, namespace: bytes, deadline: float, cancel: Event | None = None
    ) -> "Future[Outcomes]":
        """Stores block first + i of the chain from row i, evicting as needed. Blocks that are there already are done.

        A block whose parent the tier does not hold is left out (it could never be found). `namespace`: the chain's root
        digest.
        """

    def write_start(self, keys: Keys) -> int:
        """Where a write of this chain should begin, so that all of it is there after it; its length: nowhere."""
        return self.match(keys)

    @abstractmethod
    def touch(self, keys: Keys) -> None:
        """Counts a use of the leading blocks, so that what is hot above stays here too."""

    @abstractmethod
    def remove(self, key: Keys) -> int:
        """Drops one block (key [2]) and all that follow from it; returns how many."""

    @abstractmethod
    def sync(self, timeout: float) -> bool:
        """Makes what has been written survive a power cut; False if that was not finished in time."""

    @abstractmethod
    def watch(self) -> Journal | None:
        """Another journal of what can be found, for one reader, until its `end`. None: others come and go there
        too, so there is none."""

    @abstractmethod
    def stats(self) -> Mapping[str, float]:
        """Figures by name, units as suffix (`resident_blocks`, `capacity_bytes`, `read_bytes`, `corrupt_total`,
        ...).
        """

    @abstractmethod
    def close(self, timeout: float) -> None:
        """Finishes what is under way, syncs, and gives everything back. Idempotent."""
