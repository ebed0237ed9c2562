"""A fleet under a trace, in simulated time: the schedulers of `cairn.plan.schedule` before simulated instances.

What a scheduler sees is what a service sees: reports of load that are up to a second old, what the global index knows
of caches, and first and last tokens as they come.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from cairn.errors import InputError
from cairn.index import DEFAULT_POLICY, POLICIES, PrefixIndex
from cairn.plan.schedule import Ask, InstanceView, Scheduler, Send, Wait, WaitingRoom
from cairn.sim.instance import SHARED, Job, SimInstance
from cairn.sim.machine import H200_8B, Machine
from cairn.sim.trace import Keys, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """shared_blocks: of the tier that all share; 0: there is none. eviction: of all caches."""

    instances: int = 64
    machine: Machine = H200_8B
    shared_blocks: int = 32_768
    eviction: str = DEFAULT_POLICY
    report_s: float = 1.0
    ttft_slo_s: float = 2.0
    tbt_slo_s: float = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of each request [requests]; NaN where it was shed."""

    arrived: npt.NDArray[np.float64]
    first: npt.NDArray[np.float64]
    last: npt.NDArray[np.float64]
    answer: npt.NDArray[np.int64]
    prompt_tokens: int  # of all that were served
    computed_tokens: int
    loaded_tokens: int

    @property
    def ttft_s(self) -> npt.NDArray[np.float64]:
        return self.first - self.arrived

    @property
    def tbt_s(self) -> npt.NDArray[np.float64]:
        """Mean time between the tokens of an answer; 0 where there is only one."""
        return (self.last - self.first) / np.maximum(1, self.answer - 1)

    def good(self, ttft_slo_s: float, tbt_slo_s: float) -> int:
        """Requests within both bounds."""
        return int(np.count_nonzero((self.ttft_s <= ttft_slo_s) & (self.tbt_s <= tbt_slo_s)))


class _Held(Mapping[str, Mapping[str, int]]):
    """What the global index would say of a prompt; looked up when a scheduler asks for it."""

    def __init__(self, keys: Keys, instances: Sequence[SimInstance], shared: PrefixIndex | None, block: int) -> None:
        self._keys, self._instances, self._block = keys, instances, block
        self._in_shared = shared.match(keys) if shared else 0

    def __getitem__(self, name: str) -> Mapping[str, int]:
        own = self._instances[int(name)].index.match(self._keys)
        return {"vram": own * self._block, SHARED: max(0, self._in_shared - own) * self._block}

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
        policy = POLICIES[settings.eviction]
        self._shared = PrefixIndex(settings.shared_blocks, policy) if settings.shared_blocks else None
        self._instances = [SimInstance(settings.machine, policy, self._shared) for _ in range(settings.instances)]
        self._view = [
            InstanceView(
                id=str(i), cost=one.cost, token_bytes=settings.machine.token_bytes, kv_tokens=self._kv_tokens()
            )
            for i, one in enumerate(self._instances)
        ]
        self._events: list[tuple[float, _Kind, int]] = []
        self._chains: list[Keys] = [keys for _, keys in trace.chains()]
        self._asks: dict[int, Ask] = {}
        self._room = WaitingRoom()
        self._open = 0
        self._until = [0.0] * settings.instances
        self._first = np.full(len(trace), np.nan)
        self._last = np.full(len(trace), np.nan)
        self._loaded = 0
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
            loaded_tokens=self._loaded,
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
        keys, trace, settings = self._chains[number], self._trace, self._settings
        return Ask(
            id=str(number),
            prompt_tokens=int(trace.input_tokens[number]),
            arrived=float(self._arrived[number]),
            held=_Held(keys, self._instances, self._shared, settings.machine.block_tokens),
            ttft_slo_s=settings.ttft_slo_s,
            tbt_slo_s=settings.tbt_slo_s,
            max_tokens=int(trace.output_tokens[number]),
        )

    def _submit(self, number: int, to: int, now: float) -> None:
        trace, one = self._trace, self._instances[to]
        one.submit(Job(number, self._chains[number], int(trace.input_tokens[number]), int(trace.output_tokens[number])))
        if not one.computing:
            self._begin(to, now)

    def _begin(self, which: int, now: float) -> None:
        until = self._instances[which].begin(now)
        if until is not None:
            self._until[which] = until
            self._push(until, _Kind.STEP, which)

    def _step(self, which: int, now: float) -> None:
        if now != self._until[which]:  # it waited for a load, and something else came first
            return
        first, last = self._instances[which].end(now)
        for job in first:
            self._first[job.number] = now
            self._loaded += job.loaded_tokens
            self._prompts += job.prompt
            self._scheduler.first_token(self._asks[job.number], now)
        for job in last:
            self._last[job.number] = now
            self._open -= 1
            self._scheduler.finished(self._asks.pop(job.number), now, job.answer)
        self._begin(which, now)

    def _report(self, _: int, now: float) -> None:
        for view, one in zip(self._view, self._instances, strict=True):
            view.running, view.waiting, view.reported_at = one.running, one.waiting, now
        self._push(now + self._settings.report_s, _Kind.REPORT, 0)

    def _push(self, at: float, kind: _Kind, number: int) -> None:
        heapq.heappush(self._events, (at, kind, number))

    def _kv_tokens(self) -> int:
        return self._settings.machine.blocks * self._settings.machine.block_tokens


def _check(trace: Trace, machine: Machine) -> None:
    if not trace.input_tokens.all() or not trace.output_tokens.all():
        raise InputError("a request of the trace has no tokens: each line needs input_length and output_length above 0")
    blocks = np.diff(trace.starts) - (-trace.output_tokens // machine.block_tokens)
    if blocks.max() > machine.blocks:
        raise InputError(f"a request of {blocks.max()} blocks: an instance has {machine.blocks}; raise machine.blocks")
