"""Lanes: threads for calls of a native client that hang at times and cannot be interrupted, so that nobody
has to wait.
"""

import contextlib
import ctypes
import logging
import mmap
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from cairn.observe.reasons import Reason

log = logging.getLogger(__name__)

#: Lanes' memory grows in huge pages.
_HUGE: Final = 2 << 20


class Call:
    """A call under way in a lane, and its caller, who may leave."""

    def __init__(self, work: "Callable[[Call], Any]") -> None:
        self.work = work
        self.answer: Any = Reason.IO_ERROR
        self._left = False
        self._done = threading.Event()
        self._lock = threading.Lock()

    def with_caller(self, touch: Callable[..., Any], *given: Any) -> bool:
        """Does `touch`, which uses the caller's memory, with what is given, while he waits; False if he has left."""
        with self._lock:
            if not self._left:
                touch(*given)
            return not self._left

    def finish(self) -> None:
        self._done.set()

    def wait(self, deadline: float) -> Any:
        """The answer, or TIMEOUT; from then on nothing uses the caller's memory."""
        if not self._done.wait(max(0.0, deadline - time.monotonic())):
            with self._lock:
                self._left = True
        return self.answer if self._done.is_set() else Reason.TIMEOUT


class Lane:
    """A thread, and memory that a client may move bytes to and from: grown and registered as needed."""

    def __init__(self, name: str, free: "queue.LifoQueue[Lane]") -> None:
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._free = free
        self._client: Any = None
        self._map: mmap.mmap | None = None
        self.address = 0
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def start(self, call: Call | None) -> None:
        """Runs a call; None: ends the thread."""
        self._calls.put(call)

    def memory(self, client: Any, size: int) -> memoryview:
        """At least `size` bytes, registered with `client`. Raises OSError where there are none to be had."""
        if self._client is not client:
            self._client, self._map = client, None
        if self._map is None or len(self._map) < size:
            if self._map is not None:
                client.unregister_buffer(self.address)
                self._map = None  # whatever becomes of the larger one
            grown = mmap.mmap(-1, max(1, -(-size // _HUGE)) * _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):
                grown.madvise(mmap.MADV_HUGEPAGE)  # or each page of 4 KiB is faulted in, and looked up, by itself
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(grown))
            code = client.register_buffer(self.address, len(grown))
            if code != 0:
                raise OSError(f"the client registers no {len(grown)} bytes ({code})")
            self._map = grown
        return memoryview(self._map)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call.answer = call.work(call)
            except Exception:
                log.exception("a call of a native client failed in a way it should not have; please report this")
            call.finish()
            self._free.put(self)


class Lanes:
    """Lanes for as many calls at a time, and so the threads and memory that hanging ones can keep. Thread-safe.

    abandoned: calls whose callers have left before they returned.
    """

    def __init__(self, count: int, name: str) -> None:
        self._free: queue.LifoQueue[Lane] = queue.LifoQueue()  # warm memory first
        self.abandoned = 0
        for number in range(count):
            self._free.put(Lane(f"{name}-{number}", self._free))

    @property
    def free(self) -> int:
        """Lanes in which nothing is under way."""
        return self._free.qsize()

    def run(self, work: Callable[[Lane, Call], Any], deadline: float) -> Any:
        """What `work` answers, done in a lane; TIMEOUT past the deadline, IO_ERROR if it raises."""
        try:
            lane = self._free.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return Reason.TIMEOUT
        if time.monotonic() > deadline:
            self._free.put(lane)
            return Reason.TIMEOUT
        call = Call(lambda call: work(lane, call))
        lane.start(call)
        answer = call.wait(deadline)
        if answer is Reason.TIMEOUT:
            self.abandoned += 1
        return answer

    def close(self) -> None:
        """Ends the threads of all lanes that are free; no call begins any more."""
        for _ in range(self._free.qsize()):
            self._free.get().start(None)


class Client:
    """A client, and how many lanes are in a call of it: closed under one, it takes the process down."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._users = 0
        self._retired = False
        self._lock = threading.Lock()

    def enter(self) -> bool:
        """Before a call; False if it is retired."""
        with self._lock:
            self._users += not self._retired
            return not self._retired

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users or not self._retired:
                return
        close_client(self.inner)

    def retire(self) -> threading.Event | None:
        """Takes no more calls; closed once the last has returned. An event for that, if it is closed now."""
        with self._lock:
            if self._retired:
                return None
            self._retired = True
            if self._users:
                return None
        return close_client(self.inner)


def close_client(client: Any) -> threading.Event:
    """Closes a client in a thread of its own, since that may hang."""
    done = threading.Event()

    def close() -> None:
        client.close()
        done.set()

    threading.Thread(target=close, name="cairn-mooncake-close", daemon=True).start()
    return done
