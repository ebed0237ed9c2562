"""What steps take, which the planner learns from: the scheduler says which are timed, the worker times them."""

from collections import deque
from collections.abc import Callable
from typing import Final

from cairn.connect.vllm.movers import Timer
from cairn.plan import Work

#: Tokens that a step without prefill may attend to, if it is to be timed: it has to read the KV of all of them, which
#: takes longer than what prefill pays for as many pairs of a query and a key.
_BARE_CONTEXT: Final = 1 << 14


class TimedSteps:
    """Chooses steps: all with some prefill, and after each the next one without, which tells what a step costs by
    itself. (From prefills alone nobody could tell, and those of a busy start made that out to be the most of it.)
    """

    def __init__(self, block_tokens: int) -> None:
        self._block = block_tokens
        self._bare_is_due = False

    def work(self, scheduled: dict[str, int], computed: Callable[[str], int | None]) -> Work | None:
        """What the step computes, if it is to be timed, and all of it is known.

        scheduled: tokens of each request. computed: how many of a request's have KV once the step is over.
        """
        if not scheduled:
            return None
        bare = max(scheduled.values()) <= self._block
        if bare and not self._bare_is_due:
            return None
        chunks: list[tuple[int, int]] = []  # new tokens, and those before them
        for request, tokens in scheduled.items():
            upto = computed(request)
            if upto is None:
                return None
            chunks.append((tokens, upto - tokens))
        if bare and sum(map(sum, chunks)) > _BARE_CONTEXT:
            return None
        self._bare_is_due = not bare
        return Work.of(chunks)


class StepTimers:
    """The timers of steps that have begun, the first one first: the next step begins before a GPU is done with one."""

    def __init__(self) -> None:
        self._timers: deque[tuple[Work, Timer]] = deque()
        self._runs = False

    def begin(self, work: Work, timer: Timer) -> None:
        """A step begins, to `stop` when it ends."""
        if self._runs:
            self._timers.pop()  # that one has failed
        self._timers.append((work, timer))
        self._runs = True

    def stop(self) -> None:
        """The step ends. Does nothing if it is not timed."""
        if self._runs:
            self._timers[-1][1].stop()
            self._runs = False

    def next(self) -> tuple[Work, float] | None:
        """A step that is over, and the seconds it took. Not between `begin` and `stop`."""
        if self._timers and not self._runs and (seconds := self._timers[0][1].seconds()) is not None:
            return self._timers.popleft()[0], seconds
        return None
