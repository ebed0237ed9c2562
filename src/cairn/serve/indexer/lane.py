"""A thread that follows some of the publishers: an event loop of its own, and a `Subscriber` in it."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from cairn.errors import ClosedError
from cairn.fleet.instances import State
from cairn.fleet.subscriber import Subscriber
from cairn.serve.base import T

#: For the thread to end, seconds; and to begin: a large snapshot may be read first, and kernels compiled.
_ENDING_S: Final = 10.0
STARTING_S: Final = 120.0


class Lane:
    """`start` first; `close` when done. Thread-safe."""

    def __init__(self, name: str, opened: Callable[[], AbstractAsyncContextManager[Subscriber]]) -> None:
        """opened: the subscriber, for as long as the lane is there; called in its event loop."""
        self._opened = opened
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscriber: Subscriber | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._begun = threading.Event()
        self._ended: asyncio.Event | None = None

    def start(self) -> None:
        """Raises ClosedError if the thread does not begin."""
        self._thread.start()
        if not self._begun.wait(STARTING_S) or self._loop is None:
            raise ClosedError("the thread that follows events has not begun")

    def states(self) -> Sequence[State]:
        """How each publisher's stream stands."""
        return self._subscriber.states() if self._subscriber else ()

    def call(self, work: Callable[[Subscriber], Coroutine[Any, Any, T]]) -> "Future[T]":
        """What is done with the subscriber, in its event loop. Raises ClosedError."""
        if self._loop is None or self._subscriber is None or not self._thread.is_alive():
            raise ClosedError("no events are followed: the service has not started, or has ended")
        return asyncio.run_coroutine_threadsafe(work(self._subscriber), self._loop)

    def close(self) -> None:
        """Stops. Repeatable."""
        if self._loop is not None and self._ended is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join(_ENDING_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._follow())
        finally:
            self._begun.set()

    async def _follow(self) -> None:
        self._ended = asyncio.Event()
        async with self._opened() as self._subscriber:
            self._loop = asyncio.get_running_loop()
            self._begun.set()
            await self._ended.wait()
