"""What a scheduler knows of instances: what it sent them and has not seen answered, what they reported, their costs.

Reports are old when they come. So the requests that this scheduler sent itself are counted as they go, and a report
only adds what it shows beyond them: the requests of other replicas of the service.
"""

import heapq
import math
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
"""After how many new prefills a fit is made anew: an instance's own, and the fleet's."""

_FLEET_WINDOW = 256
"""Prefills that the fleet's fit is over."""

_SPARE = 64
"""Instances that are away and yet remembered, beside as many as ever were asked for at once: they may come back, and
requests for another model see none of them."""

_TIER_ROWS = {tier: row for row, tier in enumerate(TIERS)}


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
class _Life:
    """One life of an instance. queue: predicted prefill seconds of requests without a first token, oldest first."""

    id: str
    cost: CostModel
    reported_at: float = float("-inf")
    queue: OrderedDict[str, float] = field(default_factory=OrderedDict)
    decode: OnlineFit = field(default_factory=lambda: OnlineFit(2))
    took: float = 0.0
    predicted: float = 0.0
    prefills: int = 0
    answers: int = 0


class Ledger:
    """Books on instances, in arrays, so that a kernel reads them all in microseconds. Not thread-safe."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._books: Books = np.zeros(64, BOOK)
        self._lives: list[_Life] = []
        self._flights: dict[str, _Flight] = {}
        self._untold: list[tuple[float, int, str, _Flight]] = []  # heap of those that do not stream, by their time
        self._flown = 0
        self._free: list[int] = []
        self._widest = 0
        self._fleet = RecomputeCost(_FLEET_WINDOW)
        self._prefills = 0
        self._fleet_fit: FleetFit = np.zeros(4)
        self._latest: tuple[str, list[int], Estimates] = "", [], np.empty(0, ESTIMATE)  # of a request, by its slots

    def slots(self, view: Sequence[InstanceView]) -> Slots:
        """The slot of each instance, with its latest report taken in."""
        known, lives = self._slots, self._lives
        out = np.empty(len(view), np.int64)
        for i, one in enumerate(view):
            slot = known.get(one.id, -1)
            if slot < 0 or lives[slot].cost is not one.cost:
                slot = self._open(one)
            if lives[slot].reported_at != one.reported_at:
                self._report(slot, one)
            out[i] = slot
        self._widest = max(self._widest, len(view))
        if len(self._slots) > 2 * self._widest + _SPARE:
            self._forget_absent(view)
        return out

    def estimates(self, request: Ask, slots: Slots, now: float, left_s: float = math.inf) -> Estimates:
        """What each of the instances would make of `request` [len(slots)] of ESTIMATE. left_s: until it is late."""
        self._presume(now)
        width = len(TIERS)
        flat = [0] * (len(slots) * width)  # a list is filled faster than an array
        listed = slots.tolist()
        if request.held:
            for i, slot in enumerate(listed):
                held = request.held.get(self._lives[slot].id)
                if held:
                    for tier, tokens in held.items():
                        flat[i * width + _TIER_ROWS[tier]] = tokens
        table = np.array(flat, np.int64).reshape(-1, width)
        out = np.empty(len(slots), ESTIMATE)
        prompt, answer, tbt_slo_s = request.prompt_tokens, request.max_tokens, request.tbt_slo_s
        estimate(self._books, slots, table, self._fleet_fit, prompt, answer, now, left_s, tbt_slo_s, out)
        self._latest = request.id, listed, out
        return out

    def in_flight(self, slots: Slots) -> npt.NDArray[np.int64]:
        """Requests at each instance: this scheduler's, and others' by the last report."""
        requests: npt.NDArray[np.int64] = self._books["requests"][slots] + self._books["foreign"][slots]
        return requests

    def sent(self, request: Ask, choice: Send, now: float) -> None:
        """Takes in what goes where; a request that is known already begins anew."""
        self.failed(request, now)
        prefill, decode = self._slots[choice.prefill_on or choice.instance_id], self._slots[choice.instance_id]
        asked, slots, estimates = self._latest
        if asked == request.id and prefill in slots:  # it was chosen just now
            found = estimates[slots.index(prefill)]
        else:
            found = self.estimates(request, np.array([prefill], np.int64), now)[0]
        queue = self._lives[prefill].queue
        flight = _Flight(
            prefill=prefill,
            decode=decode,
            sent=now,
            compute_s=float(found["compute_s"]),
            plain_s=float(found["compute_s"] / self._books["slow"][prefill]),
            load_s=float(found["load_s"]),
            missing=int(found["missing"]),
            context=request.prompt_tokens - int(found["missing"]),
            clean=not queue and not found["load_s"],
            kv_tokens=request.prompt_tokens + request.max_tokens,
        )
        self._flights[request.id] = flight
        if not request.streams:
            self._flown += 1
            heapq.heappush(self._untold, (now + float(found["ttft_s"]), self._flown, request.id, flight))
        queue[request.id] = flight.compute_s
        if len(queue) == 1:
            self._head(prefill, now)
        self._books["pending_s"][prefill] += flight.compute_s
        for slot in {prefill, decode}:
            self._occupy(slot, 1, flight.kv_tokens)

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
            beside = (flight.beside + int(self._books["decoding"][flight.decode])) / 2
            life = self._lives[flight.decode]
            life.decode.observe((1.0, beside), (now - flight.first) / (tokens - 1))
            life.answers += 1
            if life.decode.ready and _renews(life.answers, _EVERY):
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
            self._books["decoding"][flight.decode] -= 1
        self._occupy(flight.decode, -1, -flight.kv_tokens)
        self._recycle(flight.decode)

    def _open(self, one: InstanceView) -> int:
        """A slot for a life of an instance. One that came back is another: requests of its last life end in theirs."""
        slot = self._free.pop() if self._free else len(self._lives)
        if slot == len(self._books):
            self._books = np.concatenate([self._books, np.zeros(slot, BOOK)])
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
        if self._slots.get(life.id) != slot and not self._books["requests"][slot] and slot not in self._free:
            self._free.append(slot)

    def _forget_absent(self, view: Sequence[InstanceView]) -> None:
        present = {one.id for one in view}
        for name in [name for name in self._slots if name not in present]:
            self._recycle(self._slots.pop(name))

    def _report(self, slot: int, one: InstanceView) -> None:
        books, life = self._books, self._lives[slot]
        life.reported_at = books["reported_at"][slot] = one.reported_at
        books["kv_tokens"][slot] = one.kv_tokens
        books["foreign"][slot] = max(0, one.running + one.waiting - int(books["requests"][slot]))
        books["foreign_decoding"][slot] = max(0, one.running - int(books["decoding"][slot]))
        a, b, _ = books["prefill"][slot]
        queued = a + b * one.queued_prefill_tokens if one.queued_prefill_tokens else 0.0
        books["foreign_s"][slot] = max(0.0, queued - float(books["pending_s"][slot]))
        for tier, cost in one.cost.load.items():
            if tier in _TIER_ROWS and cost.ready:
                latency, byte = cost.coefficients()
                books["latency_s"][slot][_TIER_ROWS[tier]] = latency
                books["token_s"][slot][_TIER_ROWS[tier]] = byte * one.token_bytes

    def _head(self, slot: int, now: float) -> None:
        """The oldest request in a queue is at work from now on."""
        self._books["head_s"][slot] = next(iter(self._lives[slot].queue.values()), 0.0)
        self._books["since"][slot] = now

    def _occupy(self, slot: int, requests: int, kv_tokens: int) -> None:
        self._books["requests"][slot] += requests
        self._books["kv_used"][slot] += kv_tokens

    def _presume(self, now: float) -> None:
        """Who tells no first token has it when it was expected: else a queue would seem to grow until answers end."""
        while self._untold and self._untold[0][0] <= now:
            due, _, request_id, flight = heapq.heappop(self._untold)
            # One may have streamed all the same, as to who writes "stream": 1, and told it.
            if self._flights.get(request_id) is flight and flight.first is None:
                self._begin_decode(request_id, flight, max(due, float(self._books["since"][flight.prefill])))

    def _begin_decode(self, request_id: str, flight: _Flight, now: float) -> None:
        self._leave_prefill(request_id, flight, now)
        flight.first = now
        self._books["decoding"][flight.decode] += 1
        flight.beside = int(self._books["decoding"][flight.decode])

    def _leave_prefill(self, request_id: str, flight: _Flight, now: float) -> None:
        slot, queue = flight.prefill, self._lives[flight.prefill].queue
        at_work = next(iter(queue)) == request_id
        self._books["pending_s"][slot] -= queue.pop(request_id)
        if not queue:
            self._books["pending_s"][slot] = 0.0  # no rounding is carried on
        if at_work:
            self._head(slot, now)
        if slot != flight.decode:
            self._occupy(slot, -1, -flight.kv_tokens)
            self._recycle(slot)

    def _learn_prefill(self, flight: _Flight, now: float) -> None:
        """From a first token. The fit learns from requests that found an empty queue, `slow` from all predicted."""
        life, book = self._lives[flight.prefill], self._books[flight.prefill]
        took = now - max(flight.sent + flight.load_s, float(book["since"]))
        if flight.plain_s > 0:
            life.took = _FORGET * life.took + max(took, 0.0)
            life.predicted = _FORGET * life.predicted + flight.plain_s
            book["slow"] = min(max(life.took / life.predicted, 1 / _SLOW), _SLOW)
        if flight.clean and took > 0:
            life.cost.recompute.observe(Work.of([(flight.missing, flight.context)]), took)
            self._fleet.observe(Work.of([(flight.missing, flight.context)]), took)
            life.prefills += 1
            self._prefills += 1
            if _renews(life.prefills, _EVERY):
                self._fit(flight.prefill)
            if _renews(self._prefills, _FLEET_EVERY) and self._fleet.ready:
                self._fleet_fit[:3], self._fleet_fit[3] = self._fleet.coefficients(), self._fleet.horizon

    def _fit(self, slot: int) -> None:
        cost = self._lives[slot].cost.recompute
        if cost.ready:
            self._books["prefill"][slot] = cost.coefficients()
            self._books["known"][slot] = cost.horizon


def _renews(seen: int, every: int) -> bool:
    """Whether a fit is to be made anew: at each of the first observations, then at one in `every`."""
    return seen <= every or seen % every == 0
