"""A simulated engine: continuous batching over a prefix cache, step by step.

Of a step's tokens each decoding request takes one, prefills take the rest, in the order in which they came. A request
is let in when the tokens before it no longer fill a step and its KV has room, as a whole, so nothing is ever preempted.
What tiers hold beyond the cache is loaded beside the steps where the planner finds that cheaper. Steps that nothing can
come between are one event (`Run`).
"""

import heapq
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cairn.index import EvictionPolicy, PrefixIndex
from cairn.index.slots import Keys, SlotIds
from cairn.plan import CostModel, Segment, plan_load
from cairn.sim.machine import Machine
from cairn.sim.tiers import Tier

_NONE: SlotIds = np.empty(0, np.int32)


@dataclass(slots=True, eq=False)
class Job:
    """A request at an instance. keys: of its blocks [n, 2], the first `asked` of them the prompt's, the others the
    answer's as far as known; computed: tokens that are there, of `prompt`; held: those that were not computed, by tier.
    """

    number: int
    keys: Keys
    asked: int
    prompt: int
    answer: int
    computed: int = 0
    pinned: SlotIds = field(default_factory=lambda: _NONE)
    reserved: SlotIds = field(default_factory=lambda: _NONE)
    held: dict[str, int] = field(default_factory=dict)


class Run(NamedTuple):
    """Steps of one kind behind one another: step k works for `work + k growth` seconds, and takes `floor` at least."""

    began: float
    steps: int
    work: float
    growth: float
    floor: float
    cut: bool  # whether it may end behind any step

    def end(self, steps: int) -> float:
        """When the first `steps` are over."""
        short = 0
        if self.work < self.floor:
            short = steps if self.growth <= 0 else math.ceil(min(steps, (self.floor - self.work) / self.growth))
        long = steps - short
        return self.began + short * self.floor + long * (self.work + self.growth * (short + steps - 1) / 2)

    def until(self, at: float) -> "Run":
        """Ends with the step that is under way at `at`."""
        return self._replace(steps=1 + bisect_left(range(1, self.steps), at, key=self.end))


class SimInstance:
    """Driven from outside: `submit`, then `begin` and `end` of runs of steps. Times are simulated seconds.

    tiers: beyond the KV cache, the nearest first; may be shared with other instances.
    """

    def __init__(self, machine: Machine, policy: type[EvictionPolicy], tiers: Sequence[Tier]) -> None:
        self._true = machine.cost()
        self.cost = CostModel()  # as its router knows it: loads from the start, prefills as it sees them
        self.cost.load = self._true.load
        self.index = PrefixIndex(machine.blocks, policy)
        self.tiers = tiers
        self.computing = False  # between `begin` and `end`; False while it only waits for a load
        self.computed_tokens = 0
        self._machine = machine
        self._waiting: deque[Job] = deque()
        self._loading: list[tuple[float, int, Job]] = []
        self._prefilling: deque[Job] = deque()
        self._decoding: list[tuple[int, int, Job]] = []  # by the step that ends them
        self._read = 0  # tokens that the decoding ones attend
        self._steps = 0
        self._loader_free = 0.0
        self._run = Run(0.0, 0, 0.0, 0.0, 0.0, False)

    @property
    def running(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._loading)

    def submit(self, job: Job, now: float) -> float | None:
        """Queues a job. Returns when the run under way ends now, if that is earlier than `begin` said."""
        self._waiting.append(job)
        if not (self.computing and self._run.cut):
            return None
        before, self._run = self._run, self._run.until(now)
        return self._run.end(self._run.steps) if self._run.steps < before.steps else None

    def begin(self, now: float) -> float | None:
        """Begins to compute, or waits for a load: when that will be over. None: there is nothing to do.

        While it only waits, `begin` may be called again.
        """
        self._admit(now)
        self.computing = bool(self._prefilling or self._decoding)
        if not self.computing:
            return self._loading[0][0] if self._loading else None
        self._run = self._next(now)
        return self._run.end(self._run.steps)

    def end(self, now: float) -> tuple[list[Job], list[Job]]:
        """Ends what `begin` began: the jobs that have their first token now, and those that have their last."""
        self.computing = False
        self._steps += self._run.steps
        self._read += self._run.steps * len(self._decoding)
        first: list[Job] = []
        last: list[Job] = []
        while self._decoding and self._decoding[0][0] <= self._steps:
            last.append(self._finish(heapq.heappop(self._decoding)[2], now))
        while self._prefilling and self._prefilling[0].computed == self._prefilling[0].prompt:
            job = self._prefilling.popleft()
            self._publish(job, now)
            first.append(job)
            self._read += job.prompt
            if job.answer > 1:
                heapq.heappush(self._decoding, (self._steps + job.answer - 1, job.number, job))
            else:
                last.append(self._finish(job, now))
        return first, last

    def _next(self, now: float) -> Run:
        """The steps until something else is to be done; what they prefill counts as computed."""
        machine, batch = self._machine, len(self._decoding)
        steps = self._decoding[0][0] - self._steps if batch else 1 << 30
        room = max(0, machine.chunk - batch)
        computed, attended, growth = 0, 0.0, machine.read_s * batch
        if self._prefilling and room:
            head = self._prefilling[0]
            # While the oldest fills whole steps, nobody else is let in.
            steps = max(1, min(steps, (head.prompt - head.computed) // room))
            if head.prompt - head.computed >= room:
                computed, attended = room, room * (head.computed + room / 2)
                growth += machine.attention_s * room * room
                head.computed += steps * room
            else:
                computed, attended = self._share(room)
            self.computed_tokens += steps * computed
        run = Run(
            now, steps, machine.work_s(computed, attended, batch, self._read), growth, machine.floor_s, not computed
        )
        return run.until(self._loading[0][0]) if self._loading and run.cut else run

    def _share(self, room: int) -> tuple[int, float]:
        """Gives one step's tokens to the prefills in their order: how many, and their pairs of query and key."""
        left, attended = room, 0.0
        for job in self._prefilling:
            n = min(left, job.prompt - job.computed)
            attended += n * (job.computed + n / 2)
            job.computed += n
            left -= n
            if left == 0:
                break
        return room - left, attended

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
        prompt = job.keys[: job.asked]
        job.pinned = self.index.pin(prompt, now)
        answer = -(-job.answer // self._machine.block_tokens)
        want = len(prompt) - len(job.pinned) + answer
        job.reserved = self.index.reserve(want, now)
        if len(job.reserved) < want:
            self.index.free(job.reserved)
            self.index.unpin(job.pinned)
            return False
        job.computed = min(len(job.pinned) * self._machine.block_tokens, job.prompt - 1)
        if job.computed:
            job.held["vram"] = job.computed
        return True

    def _load(self, job: Job, now: float) -> float:
        """Orders the load of what tiers have beyond the cache, if that is worth it; returns when it will be there."""
        segments, reach = [], job.computed
        for tier in self.tiers:
            held = min(tier.index.match(job.keys[: job.asked]) * self._machine.block_tokens, job.prompt - 1)
            if held > reach:
                segments.append(Segment(tier.name, held - reach))
                reach = held
        if not segments:
            return now
        size = self._machine.token_bytes
        plan = plan_load(segments, job.prompt, size, self._true, start=job.computed)
        left, ready = plan.tokens, max(now, self._loader_free)
        for name, tokens in segments:
            if left <= 0:
                break
            job.held[name] = tokens
            job.computed += tokens
            left -= tokens
            ready += self._machine.links[name].seconds(tokens * size)
        if not plan.tokens:
            return now
        self._loader_free = ready
        return ready

    def _publish(self, job: Job, now: float) -> None:
        """The prompt's blocks can be found from now on, here and in all tiers; here they stay while it decodes."""
        prompt = job.keys[: job.asked]
        if self._machine.prefix_cache:
            at = len(job.pinned)
            new = len(prompt) - at
            self.index.commit(prompt, at, job.reserved[:new], now)
            job.reserved = job.reserved[new:]
            pinned = self.index.pin(prompt, now, use=False)
            self.index.unpin(job.pinned)
            job.pinned = pinned
        for tier in self.tiers:
            tier.use(prompt, now)

    def _finish(self, job: Job, now: float) -> Job:
        """Its answer's blocks can be found from now on, and its KV may go."""
        self._read -= job.prompt + max(0, job.answer - 1)
        answered = len(job.keys) - job.asked
        if answered:
            if self._machine.prefix_cache:
                self.index.commit(job.keys, job.asked, job.reserved[:answered], now)
                job.reserved = job.reserved[answered:]
            for tier in self.tiers:
                tier.store(job.keys, job.asked, now)
        self.index.free(job.reserved)
        self.index.unpin(job.pinned)
        return job
