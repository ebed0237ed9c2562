"""A fleet under a trace, in simulated time: the schedulers of `cairn.plan.schedule` before simulated instances.

What a scheduler sees is what a service sees: reports of load that are up to a second old, what the global index knows
of caches, and first and last tokens as they come.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from cairn.errors import InputError
from cairn.index import DEFAULT_POLICY, POLICIES
from cairn.plan.schedule import Ask, InstanceView, Scheduler, Send, Wait, WaitingRoom
from cairn.plan.schedule.base import TIERS
from cairn.sim.instance import Job, SimInstance
from cairn.sim.machine import H200_8B, Machine
from cairn.sim.outcome import Outcome
from cairn.sim.tiers import Tier
from cairn.sim.trace import Keys, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """blocks: of the tiers beyond the KV cache, by name; those that are left out, or have 0, are not there. The remote
    tier is shared by all, the others by the `per_host` instances of a host. eviction: of all caches.
    """

    instances: int = 64
    per_host: int = 1
    machine: Machine = H200_8B
    blocks: Mapping[str, int] = field(default_factory=lambda: {"remote": 32_768})
    eviction: str = DEFAULT_POLICY
    report_s: float = 1.0
    ttft_slo_s: float = 2.0
    tbt_slo_s: float = 0.1


class _Held(Mapping[str, Mapping[str, int]]):
    """What the global index would say of a prompt; looked up when a scheduler asks for it."""

    def __init__(self, keys: Keys, instances: Sequence[SimInstance], block: int) -> None:
        self._keys, self._instances, self._block = keys, instances, block
        self._known: dict[Tier, int] = {}  # instances share tiers
        self._told: dict[str, Mapping[str, int]] = {}

    def __getitem__(self, name: str) -> Mapping[str, int]:
        if name not in self._told:
            self._told[name] = self._look(name)
        return self._told[name]

    def _look(self, name: str) -> Mapping[str, int]:
        one = self._instances[int(name)]
        reach = one.index.match(self._keys)
        held = {"vram": reach * self._block}
        for tier in one.tiers:
            if tier not in self._known:
                self._known[tier] = tier.index.match(self._keys)
            held[tier.name] = max(0, self._known[tier] - reach) * self._block
            reach = max(reach, self._known[tier])
        return held

    def __iter__(self) -> Iterator[str]:
        return map(str, range(len(self._instances)))

    def __len__(self) -> int:
        return len(self._instances)


class _Kind(IntEnum):
    """Of events; at equal times in this order."""

    STEP = 0
    REPORT = 1
    RETRY = 2
    ARRIVAL = 3


class FleetSim:
    """One run. rate: requests a second; the trace's own arrivals are scaled to it.

    Raises InputError for a trace without lengths, or with a request that does not fit an instance's KV cache.
    """

    def __init__(self, trace: Trace, scheduler: Scheduler, rate: float, settings: FleetSettings) -> None:
        _check(trace, settings.machine)
        self._trace, self._scheduler, self._settings = trace, scheduler, settings
        span = max(float(trace.times[-1] - trace.times[0]), 1e-9)
        self._arrived = (trace.times - trace.times[0]) * (len(trace) / rate / span)
        self._instances = _instances(settings, len(trace.keys))
        self._view = [
            InstanceView(
                id=str(i), cost=one.cost, token_bytes=settings.machine.token_bytes, kv_tokens=self._kv_tokens()
            )
            for i, one in enumerate(self._instances)
        ]
        self._events: list[tuple[float, _Kind, int]] = []
        self._asks: dict[int, Ask] = {}
        self._room = WaitingRoom()
        self._open = 0
        self._until = [0.0] * settings.instances
        self._first = np.full(len(trace), np.nan)
        self._last = np.full(len(trace), np.nan)
        self._held: Counter[str] = Counter()
        self._prompts = 0

    def run(self) -> Outcome:
        for i, at in enumerate(self._arrived.tolist()):
            self._events.append((at, _Kind.ARRIVAL, i))
        self._open = len(self._arrived)
        self._events.append((0.0, _Kind.REPORT, 0))
        heapq.heapify(self._events)
        steps = {
            _Kind.STEP: self._step,
            _Kind.REPORT: self._report,
            _Kind.RETRY: self._retry,
            _Kind.ARRIVAL: self._ask,
        }
        while self._open:
            now, kind, number = heapq.heappop(self._events)
            steps[kind](number, now)
        return Outcome(
            arrived=self._arrived,
            first=self._first,
            last=self._last,
            answer=self._trace.output_tokens,
            prompt_tokens=self._prompts,
            computed_tokens=sum(one.computed_tokens for one in self._instances),
            held_tokens=dict(self._held),
        )

    def _ask(self, number: int, now: float) -> None:
        request = self._request(number)
        choice = self._scheduler.choose(request, self._view, now)
        if isinstance(choice, Wait):
            self._wait(request, choice.until_s, now)
            return
        self._room.remove(request)
        if isinstance(choice, Send):
            self._asks[number] = request
            self._scheduler.sent(request, choice, now)
            self._submit(number, int(choice.instance_id), now)
        else:
            self._open -= 1

    def _wait(self, request: Ask, until: float, now: float) -> None:
        until = max(until, float(np.nextafter(now, np.inf)))
        before = self._room.next()
        self._room.put(request, until)
        if before is None or until < before:
            self._push(until, _Kind.RETRY, 0)

    def _retry(self, _: int, now: float) -> None:
        for request in self._room.due(now):
            self._ask(int(request.id), now)
        after = self._room.next()
        if after is not None:
            self._push(after, _Kind.RETRY, 0)

    def _request(self, number: int) -> Ask:
        trace, settings = self._trace, self._settings
        prompt = trace.chain(number)[: trace.asked[number]]
        return Ask(
            id=str(number),
            prompt_tokens=int(trace.input_tokens[number]),
            arrived=float(self._arrived[number]),
            held=_Held(prompt, self._instances, settings.machine.block_tokens),
            ttft_slo_s=settings.ttft_slo_s,
            tbt_slo_s=settings.tbt_slo_s,
            max_tokens=int(trace.output_tokens[number]),
        )

    def _submit(self, number: int, to: int, now: float) -> None:
        trace, one = self._trace, self._instances[to]
        prompt, answer = int(trace.input_tokens[number]), int(trace.output_tokens[number])
        until = one.submit(Job(number, trace.chain(number), int(trace.asked[number]), prompt, answer), now)
        if not one.computing:
            until = one.begin(now)
        self._end_at(to, until)

    def _end_at(self, which: int, until: float | None) -> None:
        """The instance's run of steps, or its wait for a load, is over then; what was said before is void."""
        if until is not None:
            self._until[which] = until
            self._push(until, _Kind.STEP, which)

    def _step(self, which: int, now: float) -> None:
        if now != self._until[which]:  # something else came first
            return
        first, last = self._instances[which].end(now)
        for job in first:
            self._first[job.number] = now
            for tier, tokens in job.held.items():
                self._held[tier] += tokens
            self._prompts += job.prompt
            self._scheduler.first_token(self._asks[job.number], now)
        for job in last:
            self._last[job.number] = now
            self._open -= 1
            self._scheduler.finished(self._asks.pop(job.number), now, job.answer)
        self._end_at(which, self._instances[which].begin(now))

    def _report(self, _: int, now: float) -> None:
        for view, one in zip(self._view, self._instances, strict=True):
            view.running, view.waiting, view.reported_at = one.running, one.waiting, now
        self._push(now + self._settings.report_s, _Kind.REPORT, 0)

    def _push(self, at: float, kind: _Kind, number: int) -> None:
        heapq.heappush(self._events, (at, kind, number))

    def _kv_tokens(self) -> int:
        return self._settings.machine.blocks * self._settings.machine.block_tokens


def _instances(settings: FleetSettings, distinct: int) -> list[SimInstance]:
    """With their tiers. Room for more than the trace's `distinct` blocks would stay empty, and is not made."""
    policy = POLICIES[settings.eviction]
    sizes = [(name, min(settings.blocks.get(name, 0), distinct)) for name in TIERS[1:]]
    remote = [Tier(name, size, policy) for name, size in sizes if name == "remote" and size]
    made = []
    for i in range(settings.instances):
        if i % settings.per_host == 0:
            host = [Tier(name, size, policy) for name, size in sizes if name != "remote" and size]
        made.append(SimInstance(settings.machine, policy, [*host, *remote]))
    return made


def _check(trace: Trace, machine: Machine) -> None:
    if not trace.input_tokens.all() or not trace.output_tokens.all():
        raise InputError("a request of the trace has no tokens: each line needs input_length and output_length above 0")
    blocks = trace.asked - (-trace.output_tokens // machine.block_tokens)
    if blocks.max() > machine.blocks:
        raise InputError(f"a request of {blocks.max()} blocks: an instance has {machine.blocks}; raise machine.blocks")
