"""One asynchronous task: what was matched, what runs, and what came of it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.copy import TokenSlots
from cairn.engine.hold import Hold
from cairn.engine.layers import LayerLoad
from cairn.engine.stage import Stage
from cairn.kv import KeyChain


class TaskStatus(StrEnum):
    """The statuses that users of FlexKV know."""

    SUCCESS = "SUCCESS"  # all that was matched, or all that was given, was moved
    NOTFOUND = "NOTFOUND"  # there was nothing to move, or there is no such task
    UNREADY = "UNREADY"  # matched and not launched, or still under way
    TIMEOUT = "TIMEOUT"  # stopped because it was not finished in time; nothing touches the KV cache any more
    CANCELLED = "CANCELLED"  # stopped by `cancel`, by the end of its lease or of the engine
    FAILED = "FAILED"  # less was moved than was matched; `mask` says what was


class TaskResult(NamedTuple):
    """status, and mask: bool [n], the tokens that were loaded (get), became resident (put) or came up (prefetch)."""

    status: TaskStatus
    mask: npt.NDArray[np.bool_]


class Task:
    """A task from its match to its result. `run` moves the data, on a worker.

    start, stop: the tokens it is about. slots: of tokens start.., once launched. held: what a get or a prefetch reads
    from. `future` always completes: by `run`, or by `abandon` if it had not begun.
    """

    def __init__(self, chain: KeyChain, start: int, stop: int, run: "Callable[[Task], TaskResult]") -> None:
        self.chain = chain
        self.start = start
        self.stop = stop
        self.run = run
        self.slots: TokenSlots | None = None
        self.held: Stage | Hold | None = None
        self.lease = 0
        self.launched = False
        self.layerwise = False
        self.layers: LayerLoad | None = None
        self.layers_started = threading.Event()
        self.future: Future[TaskResult] = Future()
        self.cancelled = threading.Event()

    def result(self, status: TaskStatus, upto: int = 0) -> TaskResult:
        """A result with tokens start..upto."""
        mask = np.zeros(self.chain.tokens, np.bool_)
        mask[self.start : upto] = True
        return TaskResult(status, mask)

    def outcome(self, upto: int) -> TaskResult:
        """The result of having moved tokens start..upto."""
        if self.stop <= self.start:
            return self.result(TaskStatus.NOTFOUND)
        if upto >= self.stop:
            return self.result(TaskStatus.SUCCESS, upto)
        return self.result(TaskStatus.CANCELLED if self.cancelled.is_set() else TaskStatus.FAILED, upto)

    def begin(self) -> bool:
        """Called by the worker; False if the task was abandoned before its turn."""
        return self.future.set_running_or_notify_cancel()

    def abandon(self) -> None:
        """Ends a task that has not begun at once, one that runs at its next step."""
        self.cancelled.set()
        not_begun = self.future.cancel()
        if not_begun:
            self.layers_started.set()  # who waits for one waits for nothing
        if self.held:
            self.held.abandon()
            if not_begun:
                self.held.release()
