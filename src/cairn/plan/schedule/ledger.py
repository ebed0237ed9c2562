"""What a scheduler knows of instances: what it sent them and has not seen answered, what they reported, their costs.

Reports are old when they come. So the requests that this scheduler sent itself are counted as they go, and a report
only adds what it shows beyond them: the requests of other replicas of the service.
"""

import heapq
import math
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from cairn.plan.cost import CostModel, OnlineFit, RecomputeCost, Work
from cairn.plan.schedule.base import TIERS, Ask, InstanceView, Send
from cairn.plan.schedule.estimate import BOOK, ESTIMATE, Books, Estimates, FleetFit, Slots, estimate

_FORGET = 0.9
"""How much of the past a measured prefill leaves in the ratio of measured to predicted."""

_SLOW = 4.0
"""That ratio's bound, either way."""

_EVERY, _FLEET_EVERY = 4, 16
"""After how many new observations a fit is made anew: an instance's own, and the fleet's."""

_PAUSE_S = 0.05
"""Between two fits of the same: at thousands of requests a second they would be a tenth of what a request costs."""

_FLEET_WINDOW = 256
"""Prefills that the fleet's fit is over."""

_SPARE = 64
"""Instances that are away and yet remembered, beside as many as ever were asked for at once: they may come back, and
requests for another model see none of them."""

_TIER_ROWS = {tier: row for row, tier in enumerate(TIERS)}


def _pattern(row: np.dtype[np.void], fields: int | None = None) -> struct.Struct:
    """Of the first of a row's fields: so many values packed or unpacked at once take a third of what numpy does."""
    kinds = {"f": "d", "i": "q", "b": "?"}
    return struct.Struct("=" + "".join(kinds[row[name].kind] for name in (row.names or ())[:fields]))


_OWN = _pattern(BOOK, 6)
"""What this scheduler's own requests come to, with which a row of the books begins."""

_ROW = _pattern(ESTIMATE)
"""All of an estimate."""


class _Flight(msgspec.Struct, kw_only=True):
    """A request on its way. prefill, decode: slots; plain_s: compute_s as if `slow` were 1; clean: it found an empty
    queue, and loads nothing.
    """

    prefill: int
    decode: int
    sent: float
    compute_s: float
    plain_s: float
    load_s: float
    missing: int
    context: int
    clean: bool
    kv_tokens: int
    first: float | None = None
    beside: int = 0  # requests that decoded at its first token


@dataclass(slots=True)
class _Renewal:
    """When a fit is to be made anew: at each of the first observations, then at one in `every`."""

    every: int
    _seen: int = 0
    _made: float = -math.inf

    def due(self, now: float) -> bool:
        """Counts an observation."""
        self._seen += 1
        if self._seen > self.every and (self._seen % self.every or now - self._made < _PAUSE_S):
            return False
        self._made = now
        return True


@dataclass(slots=True)
class _Life:
    """One life of an instance. queue: predicted prefill seconds of requests without a first token, oldest first.

    pending_s to kv_used, slow: as in its row of the books, which kernels read; a number of Python's is read and
    changed in a fraction of the time that one of numpy's takes.
    """

    id: str
    cost: CostModel
    reported_at: float = float("-inf")
    queue: OrderedDict[str, float] = field(default_factory=OrderedDict)
    pending_s: float = 0.0
    head_s: float = 0.0
    since: float = 0.0
    requests: int = 0
    decoding: int = 0
    kv_used: int = 0
    slow: float = 1.0
    decode: OnlineFit = field(default_factory=lambda: OnlineFit(2))
    took: float = 0.0
    predicted: float = 0.0
    prefills: _Renewal = field(default_factory=lambda: _Renewal(_EVERY))
    answers: _Renewal = field(default_factory=lambda: _Renewal(_EVERY))


class Ledger:
    """Books on instances, in arrays, so that a kernel reads them all in microseconds. Not thread-safe."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._books: Books = np.zeros(64, BOOK)
        self._rows = _bytes_of(self._books)
        self._lives: list[_Life] = []
        self._flights: dict[str, _Flight] = {}
        self._untold: list[tuple[float, int, str, _Flight]] = []  # heap of those that do not stream, by their time
        self._flown = 0
        self._free: list[int] = []
        self._widest = 0
        self._viewed: tuple[list[InstanceView], list[float], Slots] = [], [], np.empty(0, np.int64)
        self._fleet = RecomputeCost(_FLEET_WINDOW)
        self._prefills = _Renewal(_FLEET_EVERY)
        self._fleet_fit: FleetFit = np.zeros(4)
        self._out: Estimates = np.empty(0, ESTIMATE)
        self._out_rows = _bytes_of(self._out)
        self._latest: tuple[str, list[int]] = "", []  # whose estimates these are: a request's, by its slots

    def slots(self, view: Sequence[InstanceView]) -> Slots:
        """The slot of each instance, with its latest report taken in."""
        reported = [one.reported_at for one in view]
        if view == self._viewed[0] and reported == self._viewed[1]:  # the same views: nothing is new, as a rule
            return self._viewed[2]
        known, lives, found = self._slots, self._lives, []
        for one in view:
            slot = known.get(one.id, -1)
            if slot < 0 or lives[slot].cost is not one.cost:
                slot = self._open(one)
            if lives[slot].reported_at != one.reported_at:
                self._report(slot, one)
            found.append(slot)
        self._widest = max(self._widest, len(view))
        if len(self._slots) > 2 * self._widest + _SPARE:
            self._forget_absent(view)
        self._viewed = [*view], reported, np.array(found, np.int64)
        return self._viewed[2]

    def estimates(self, request: Ask, slots: Slots, now: float) -> Estimates:
        """What each of the instances would make of `request` [len(slots)] of ESTIMATE. Good until the next call."""
        return self.compare(request, slots, now, math.inf, 0, 0.0)[0]

    def compare(
        self, request: Ask, slots: Slots, now: float, left_s: float, turn: int, tie_s: float
    ) -> tuple[Estimates, int]:
        """Its `estimates`, and of them the `soonest`. left_s: until it is late."""
        self._presume(now)
        listed, table = slots.tolist(), np.zeros((len(slots), len(TIERS)), np.int64)
        if request.held:
            for i, slot in enumerate(listed):
                held = request.held.get(self._lives[slot].id)
                if held:
                    for tier, tokens in held.items():
                        table[i, _TIER_ROWS[tier]] = tokens
        if len(self._out) != len(slots):
            self._out = np.empty(len(slots), ESTIMATE)
            self._out_rows = _bytes_of(self._out)
        prompt, answer, tbt_slo_s = request.prompt_tokens, request.max_tokens, request.tbt_slo_s
        books, fleet, out = self._books, self._fleet_fit, self._out
        best = estimate(books, slots, table, fleet, prompt, answer, now, left_s, tbt_slo_s, turn, tie_s, out)
        self._latest = request.id, listed
        return out, best

    def in_flight(self, slots: Slots) -> npt.NDArray[np.int64]:
        """Requests at each instance: this scheduler's, and others' by the last report."""
        requests: npt.NDArray[np.int64] = self._books["requests"][slots] + self._books["foreign"][slots]
        return requests

    def sent(self, request: Ask, choice: Send, now: float) -> None:
        """Takes in what goes where; a request that is known already begins anew."""
        if request.id in self._flights:
            self.failed(request, now)
        prefill, decode = self._slots[choice.prefill_on or choice.instance_id], self._slots[choice.instance_id]
        asked, slots = self._latest
        if asked != request.id or prefill not in slots:  # it was not chosen just now
            slots = [prefill]
            self.estimates(request, np.array(slots, np.int64), now)
        at = slots.index(prefill) * ESTIMATE.itemsize
        ttft_s, _, load_s, compute_s, _, _, _, missing, _, _ = _ROW.unpack_from(self._out_rows, at)
        life = self._lives[prefill]
        flight = _Flight(
            prefill=prefill,
            decode=decode,
            sent=now,
            compute_s=compute_s,
            plain_s=compute_s / life.slow,
            load_s=load_s,
            missing=missing,
            context=request.prompt_tokens - missing,
            clean=not life.queue and not load_s,
            kv_tokens=request.prompt_tokens + request.max_tokens,
        )
        self._flights[request.id] = flight
        if not request.streams:
            self._flown += 1
            heapq.heappush(self._untold, (now + ttft_s, self._flown, request.id, flight))
        life.queue[request.id] = compute_s
        life.pending_s += compute_s
        if len(life.queue) == 1:
            life.head_s, life.since = compute_s, now
        self._occupy(prefill, 1, flight.kv_tokens)
        if decode != prefill:
            self._occupy(decode, 1, flight.kv_tokens)

    def first_token(self, request: Ask, now: float) -> None:
        self._presume(now)
        flight = self._flights.get(request.id)
        if flight is None or flight.first is not None:
            return
        self._learn_prefill(flight, now)
        self._begin_decode(request.id, flight, now)

    def finished(self, request: Ask, now: float, tokens: int) -> None:
        flight = self._flights.get(request.id)
        if flight is not None and flight.first is not None and tokens > 1 and request.streams:
            life = self._lives[flight.decode]
            beside = (flight.beside + life.decoding) / 2
            life.decode.observe((1.0, beside), (now - flight.first) / (tokens - 1))
            if life.answers.due(now) and life.decode.ready:
                self._books["decode"][flight.decode] = life.decode.coefficients()
        self.failed(request, now)

    def failed(self, request: Ask, now: float) -> None:
        """Forgets a request, and learns nothing from it."""
        flight = self._flights.pop(request.id, None)
        if flight is None:
            return
        if flight.first is None:
            self._leave_prefill(request.id, flight, now)
        else:
            self._lives[flight.decode].decoding -= 1
        self._occupy(flight.decode, -1, -flight.kv_tokens)
        self._recycle(flight.decode)

    def _open(self, one: InstanceView) -> int:
        """A slot for a life of an instance. One that came back is another: requests of its last life end in theirs."""
        slot = self._free.pop() if self._free else len(self._lives)
        if slot == len(self._books):
            self._books = np.concatenate([self._books, np.zeros(slot, BOOK)])
            self._rows = _bytes_of(self._books)
        if slot == len(self._lives):
            self._lives.append(_Life(one.id, one.cost))
        else:
            self._lives[slot] = _Life(one.id, one.cost)
        before = self._slots.get(one.id)
        self._slots[one.id] = slot
        if before is not None:
            self._recycle(before)
        self._books[slot] = 0
        self._books["slow"][slot] = 1.0
        self._fit(slot)
        return slot

    def _recycle(self, slot: int) -> None:
        """Frees the slot of a life that is over, once its last request has ended."""
        life = self._lives[slot]
        if not life.requests and self._slots.get(life.id) != slot and slot not in self._free:
            self._free.append(slot)

    def _forget_absent(self, view: Sequence[InstanceView]) -> None:
        present = {one.id for one in view}
        for name in [name for name in self._slots if name not in present]:
            self._recycle(self._slots.pop(name))

    def _report(self, slot: int, one: InstanceView) -> None:
        books, life = self._books, self._lives[slot]
        life.reported_at = books["reported_at"][slot] = one.reported_at
        books["kv_tokens"][slot] = one.kv_tokens
        books["foreign"][slot] = max(0, one.running + one.waiting - life.requests)
        books["foreign_decoding"][slot] = max(0, one.running - life.decoding)
        a, b, _ = books["prefill"][slot]
        queued = a + b * one.queued_prefill_tokens if one.queued_prefill_tokens else 0.0
        books["foreign_s"][slot] = max(0.0, queued - life.pending_s)
        for tier, cost in one.cost.load.items():
            if tier in _TIER_ROWS and cost.ready:
                latency, byte = cost.coefficients()
                books["latency_s"][slot][_TIER_ROWS[tier]] = latency
                books["token_s"][slot][_TIER_ROWS[tier]] = byte * one.token_bytes

    def _occupy(self, slot: int, requests: int, kv_tokens: int) -> None:
        life = self._lives[slot]
        life.requests += requests
        life.kv_used += kv_tokens
        self._write(slot, life)

    def _write(self, slot: int, life: _Life) -> None:
        """For kernels to read."""
        at, one = slot * BOOK.itemsize, life
        _OWN.pack_into(self._rows, at, one.pending_s, one.head_s, one.since, one.requests, one.decoding, one.kv_used)

    def _presume(self, now: float) -> None:
        """Who tells no first token has it when it was expected: else a queue would seem to grow until answers end."""
        while self._untold and self._untold[0][0] <= now:
            due, _, request_id, flight = heapq.heappop(self._untold)
            # One may have streamed all the same, as to who writes "stream": 1, and told it.
            if self._flights.get(request_id) is flight and flight.first is None:
                self._begin_decode(request_id, flight, max(due, self._lives[flight.prefill].since))

    def _begin_decode(self, request_id: str, flight: _Flight, now: float) -> None:
        self._leave_prefill(request_id, flight, now)
        life = self._lives[flight.decode]
        flight.first = now
        life.decoding += 1
        flight.beside = life.decoding
        self._write(flight.decode, life)

    def _leave_prefill(self, request_id: str, flight: _Flight, now: float) -> None:
        """The decode side's row is left to be written by the caller."""
        slot = flight.prefill
        life = self._lives[slot]
        queue = life.queue
        at_work = next(iter(queue)) == request_id
        life.pending_s -= queue.pop(request_id)
        if not queue:
            life.pending_s = 0.0  # no rounding is carried on
        if at_work:  # the oldest of the rest is, from now on
            life.head_s, life.since = next(iter(queue.values()), 0.0), now
        if slot != flight.decode:
            self._occupy(slot, -1, -flight.kv_tokens)
            self._recycle(slot)

    def _learn_prefill(self, flight: _Flight, now: float) -> None:
        """From a first token. The fit learns from requests that found an empty queue, `slow` from all predicted."""
        life = self._lives[flight.prefill]
        took = now - max(flight.sent + flight.load_s, life.since)
        if flight.plain_s > 0:
            life.took = _FORGET * life.took + max(took, 0.0)
            life.predicted = _FORGET * life.predicted + flight.plain_s
            life.slow = min(max(life.took / life.predicted, 1 / _SLOW), _SLOW)
            self._books["slow"][flight.prefill] = life.slow
        if flight.clean and took > 0:
            life.cost.recompute.observe(Work.of([(flight.missing, flight.context)]), took)
            self._fleet.observe(Work.of([(flight.missing, flight.context)]), took)
            if life.prefills.due(now):
                self._fit(flight.prefill)
            if self._prefills.due(now) and self._fleet.ready:
                self._fleet_fit[:3], self._fleet_fit[3] = self._fleet.coefficients(), self._fleet.horizon

    def _fit(self, slot: int) -> None:
        cost = self._lives[slot].cost.recompute
        if cost.ready:
            self._books["prefill"][slot] = cost.coefficients()
            self._books["known"][slot] = cost.horizon


def _bytes_of(rows: npt.NDArray[np.void]) -> memoryview:
    """To keep: a buffer is made in microseconds where rows have fields."""
    return rows.view(np.uint8).data
