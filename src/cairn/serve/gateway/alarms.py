"""Waits of one length, many at once."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

Who = TypeVar("Who")


class Alarms(Generic[Who]):
    """Rings for whoever does not cancel in time. One timer for all of them: one of the loop's own, set and cancelled,
    costs as much as a system call. For one event loop.
    """

    def __init__(self, seconds: float, ring: Callable[[Who], None]) -> None:
        self.seconds, self._ring = seconds, ring
        self._loop = asyncio.get_running_loop()
        self._due: dict[Who, float] = {}  # in this order
        self._timer: asyncio.TimerHandle | None = None

    def set(self, who: Who) -> None:
        """For somebody for whom none is set."""
        due = self._due[who] = self._loop.time() + self.seconds
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._look)

    def cancel(self, who: Who) -> None:
        """Repeatable."""
        self._due.pop(who, None)

    def _look(self) -> None:
        self._timer = None
        while self._due:
            who, due = next(iter(self._due.items()))
            if due > self._loop.time():
                self._timer = self._loop.call_at(due, self._look)
                return
            del self._due[who]
            self._ring(who)
