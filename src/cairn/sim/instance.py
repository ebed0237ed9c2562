"""A simulated engine: continuous batching over a prefix cache, step by step.

Of a step's tokens each decoding request takes one, prefills take the rest, in the order in which they came. A request
is let in when the tokens before it no longer fill a step and its KV has room, as a whole, so nothing is ever preempted.
What the shared tier holds beyond the cache is loaded beside the steps where the planner finds that cheaper.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from cairn.index import EvictionPolicy, PrefixIndex
from cairn.index.slots import Keys, SlotIds
from cairn.plan import CostModel, Segment, plan_load
from cairn.sim.machine import Machine

SHARED = "remote"
"""The shared tier's name among `cairn.plan.schedule.base.TIERS`."""

_NONE: SlotIds = np.empty(0, np.int32)


@dataclass(slots=True, eq=False)
class Job:
    """A request at an instance. keys: of its blocks [n, 2]; computed: tokens that are there, of `prompt`."""

    number: int
    keys: Keys
    prompt: int
    answer: int
    computed: int = 0
    pinned: SlotIds = field(default_factory=lambda: _NONE)
    reserved: SlotIds = field(default_factory=lambda: _NONE)
    hit_tokens: int = 0
    loaded_tokens: int = 0


class SimInstance:
    """Driven from outside: `submit`, then `begin` and `end` of steps. Times are simulated seconds."""

    def __init__(self, machine: Machine, policy: type[EvictionPolicy], shared: PrefixIndex | None) -> None:
        self.cost = CostModel()
        self.index = PrefixIndex(machine.blocks, policy)
        self.computing = False  # between `begin` and `end`; False while it only waits for a load
        self.computed_tokens = 0
        self._machine = machine
        self._shared = shared
        self._waiting: deque[Job] = deque()
        self._loading: list[tuple[float, int, Job]] = []
        self._prefilling: deque[Job] = deque()
        self._decoding: list[tuple[int, int, Job]] = []  # by the step that ends them
        self._read = 0  # tokens that the decoding ones attend
        self._steps = 0
        self._loader_free = 0.0
        self._true = self._true_cost()

    @property
    def running(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._loading)

    def submit(self, job: Job) -> None:
        self._waiting.append(job)

    def begin(self, now: float) -> float | None:
        """Begins a step, or waits for a load: when that will be over. None: there is nothing to do.

        While it only waits, `begin` may be called again.
        """
        self._admit(now)
        batch = len(self._decoding)
        left, attended = max(0, self._machine.chunk - batch), 0.0
        computed = 0
        for job in self._prefilling:
            n = min(left, job.prompt - job.computed)
            attended += n * (job.computed + n / 2)
            job.computed += n
            computed += n
            left -= n
            if left == 0:
                break
        self.computed_tokens += computed
        self.computing = computed > 0 or batch > 0
        if not self.computing:
            return self._loading[0][0] if self._loading else None
        return now + self._machine.step_s(computed, attended, batch, self._read)

    def end(self, now: float) -> tuple[list[Job], list[Job]]:
        """Ends what `begin` began: the jobs that have their first token now, and those that have their last."""
        self.computing = False
        self._steps += 1
        self._read += len(self._decoding)
        first: list[Job] = []
        last: list[Job] = []
        while self._decoding and self._decoding[0][0] <= self._steps:
            last.append(self._finish(heapq.heappop(self._decoding)[2]))
        while self._prefilling and self._prefilling[0].computed == self._prefilling[0].prompt:
            job = self._prefilling.popleft()
            self._publish(job, now)
            first.append(job)
            self._read += job.prompt
            if job.answer > 1:
                heapq.heappush(self._decoding, (self._steps + job.answer - 1, job.number, job))
            else:
                last.append(self._finish(job))
        return first, last

    def _admit(self, now: float) -> None:
        while self._loading and self._loading[0][0] <= now:
            self._prefilling.append(heapq.heappop(self._loading)[2])
        open_tokens = sum(job.prompt - job.computed for job in self._prefilling)
        while (
            self._waiting
            and open_tokens < self._machine.chunk - len(self._decoding)
            and self.running + len(self._loading) < self._machine.running
        ):
            job = self._waiting[0]
            if not self._take_room(job, now):
                return
            self._waiting.popleft()
            ready = self._load(job, now)
            if ready > now:
                heapq.heappush(self._loading, (ready, job.number, job))
            else:
                self._prefilling.append(job)
                open_tokens += job.prompt - job.computed

    def _take_room(self, job: Job, now: float) -> bool:
        """Pins what is cached and reserves the rest, the answer's blocks too; or nothing, if that does not fit."""
        job.pinned = self.index.pin(job.keys, now)
        answer = -(-job.answer // self._machine.block_tokens)
        want = len(job.keys) - len(job.pinned) + answer
        job.reserved = self.index.reserve(want, now)
        if len(job.reserved) < want:
            self.index.free(job.reserved)
            self.index.unpin(job.pinned)
            return False
        job.hit_tokens = job.computed = min(len(job.pinned) * self._machine.block_tokens, job.prompt - 1)
        return True

    def _load(self, job: Job, now: float) -> float:
        """Orders the load of what the shared tier has more, if that is worth it; returns when it will be there."""
        if self._shared is None:
            return now
        held = self._shared.match(job.keys)
        more = min(held * self._machine.block_tokens, job.prompt - 1) - job.computed
        if more <= 0:
            return now
        size = self._machine.token_bytes
        plan = plan_load([Segment(SHARED, more)], job.prompt, size, self._true, start=job.computed)
        if not plan.tokens:
            return now
        began = max(now, self._loader_free)
        took = self._machine.load_s(plan.tokens * size)
        self._loader_free = began + took
        self.cost.observe_load(SHARED, plan.tokens * size, took)
        job.loaded_tokens = plan.tokens
        job.computed += plan.tokens
        return self._loader_free

    def _publish(self, job: Job, now: float) -> None:
        """The prompt's blocks can be found from now on, here and in the shared tier; they stay while it decodes."""
        at = len(job.pinned)
        new = len(job.keys) - at
        self.index.commit(job.keys, at, job.reserved[:new], now)
        job.reserved = job.reserved[new:]
        pinned = self.index.pin(job.keys, now, use=False)
        self.index.unpin(job.pinned)
        job.pinned = pinned
        if self._shared is not None:
            at = self._shared.touch(job.keys, now)
            self._shared.commit(job.keys, at, self._shared.reserve(len(job.keys) - at, now), now)

    def _finish(self, job: Job) -> Job:
        self._read -= job.prompt + max(0, job.answer - 1)
        self.index.free(job.reserved)
        self.index.unpin(job.pinned)
        return job

    def _true_cost(self) -> CostModel:
        """The engine's own planner knows its machine."""
        cost, machine = CostModel(), self._machine
        for tokens in (512, 4096, 32768, 131_072):
            cost.recompute.observe(tokens, 0, machine.step_s(tokens, tokens * tokens / 2, 0, 0))
            cost.observe_load(SHARED, tokens * machine.token_bytes, machine.load_s(tokens * machine.token_bytes))
        return cost
