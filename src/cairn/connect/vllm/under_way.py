"""Copies that workers were told to make and have not all reported."""

from collections.abc import Iterator
from typing import NamedTuple

from cairn.connect.vllm.messages import Done
from cairn.node.base import Home, VramHome
from cairn.observe.reasons import Reason


class Load(NamedTuple):
    """A copy to a request's pages: how many blocks from which tier's memory, and where they are."""

    request: str
    tier: str = "dram"
    blocks: int = 0
    home: Home | VramHome | None = None


class Store(NamedTuple):
    """A copy from a request's pages."""

    request: str


class Ended(NamedTuple):
    """A copy that every rank has made, or failed to. failed: why one did. seconds: on the slowest."""

    number: int
    copy: Load | Store
    failed: Reason | None
    seconds: float


class UnderWay:
    """Numbers copies, and counts the ranks that report them. Not thread-safe."""

    def __init__(self, ranks: int) -> None:
        self.copies: dict[int, Load | Store] = {}
        self._ranks = ranks
        self._reports: dict[int, int] = {}
        self._failed: dict[int, Reason] = {}
        self._unforgiven: set[int] = set()
        self._number = 0

    def begin(self, copy: Load | Store) -> int:
        """The number by which it will be reported."""
        self._number += 1
        self.copies[self._number] = copy
        return self._number

    def ended(self, done: Done) -> Iterator[Ended]:
        """Those that are over with this report: one rank's failure spoils a copy for all, once all have reported."""
        for number, ranks in done.copies.items():
            reports = self._reports[number] = self._reports.get(number, 0) + ranks
            if number in done.failed:
                self._failed[number] = done.failed[number]
                self._unforgiven.add(number)
            if reports >= self._ranks:
                del self._reports[number]
                copy = self.copies.pop(number, None)
                failed = self._failed.pop(number, None)
                if copy:
                    yield Ended(number, copy, failed, done.seconds.get(number, 0.0))

    def forgiven(self) -> set[int]:
        """Failed copies that have been heard of since this was last asked."""
        forgiven, self._unforgiven = self._unforgiven, set()
        return forgiven
