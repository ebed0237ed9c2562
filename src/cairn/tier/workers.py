"""A pool of I/O threads with two queues: what a request waits for goes before what can wait."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

log = logging.getLogger(__name__)

Task = Callable[[], None]

#: What a tier's close may take in any case, seconds: threads that have nothing to do need a moment to end, and files
#: that are not closed then never are.
GRACE_S: Final = 1.0


class Workers:
    """Daemon threads that run tasks, the urgent ones first, each in the order of `submit`.

    Not concurrent.futures: its threads are joined when the interpreter exits, so one stuck device would keep the
    process from ever ending; it also knows no urgency and costs several times as much a task. A task must not raise.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._tokens: SimpleQueue[bool] = SimpleQueue()
        self._urgent: deque[Task] = deque()
        self._patient: deque[Task] = deque()
        self._busy_since: dict[int, float] = {}
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task, *, urgent: bool, times: int = 1) -> None:
        """Runs `task` soon, `times` times, in any threads. Never blocks."""
        (self._urgent if urgent else self._patient).extend([task] * times)
        for _ in range(times):
            self._tokens.put(True)

    def longest_seconds(self) -> float:
        """How long the task that has been running longest has been; 0 if all are idle."""
        now = time.monotonic()
        return max((now - since for since in list(self._busy_since.values())), default=0.0)

    def stop(self, timeout: float) -> bool:
        """Ends the threads once the queues are empty; False if some were still busy after `timeout` seconds."""
        until = time.monotonic() + timeout
        for _ in self._threads:
            self._tokens.put(False)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        me = threading.get_ident()
        while self._tokens.get():
            task = self._next()
            self._busy_since[me] = time.monotonic()
            try:
                task()
            except Exception:
                log.exception("an I/O task failed in a way it should have caught; please report this")
            del self._busy_since[me]

    def _next(self) -> Task:
        # A token stands for a task that is in one of the queues; which one may change while looking.
        while True:
            for queue in (self._urgent, self._patient):
                try:
                    return queue.popleft()
                except IndexError:
                    continue
