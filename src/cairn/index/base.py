"""The eviction policy's contract."""

from abc import ABC, abstractmethod
from typing import ClassVar

from cairn.index.slots import Keys, SlotIds, Slots


class EvictionPolicy(ABC):
    """Chooses which resident blocks of one tier go when room is needed.

    A policy works on the index's slot array, where the last fields of a record (`queue`, `uses`, `mark`, `older`,
    `newer`, `stamp`, `born`, `aux`) are its own. Slot ids are int32 arrays, the blocks of a prompt from its root
    towards its leaf. `now` is in seconds on the caller's clock, never going back. The index calls under its lock, batch
    by batch.
    """

    name: ClassVar[str]

    def __init__(self, slots: Slots) -> None:
        self.slots = slots

    @abstractmethod
    def insert(self, ids: SlotIds, now: float) -> None:
        """Blocks that have just become resident."""

    @abstractmethod
    def access(self, keys: Keys, ids: SlotIds, now: float) -> None:
        """A request has asked for the chain `keys` [n, 2] and has used the leading blocks of it that are resident,
        `ids`.
        """

    @abstractmethod
    def remove(self, ids: SlotIds) -> None:
        """Blocks that leave the index for another reason than eviction; called while they still are resident."""

    @abstractmethod
    def evict(self, want: int, pinned: int, now: float) -> SlotIds:
        """Chooses up to `want` blocks, forgets them and unlinks them from the forest (`slots.unlink`), leaves first.

        Only a block for which `slots.evictable` holds at its turn may be chosen, which keeps every tier prefix-closed.
        Returns fewer only if too few are evictable. Costs O(want) amortized; `pinned` blocks (a count) may be stepped
        over.
        """
