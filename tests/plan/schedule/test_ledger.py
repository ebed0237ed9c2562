"""What is remembered of instances: queues, lives, reports, and what is learned from first tokens."""

import msgspec
import numpy as np
import pytest
from tests.plan.schedule.driving import ask, instance

from cairn.plan.role import Role
from cairn.plan.schedule import InstanceView, Send
from cairn.plan.schedule.ledger import _ROW, Ledger


def queue(ledger: Ledger, view: InstanceView, now: float) -> float:
    found = ledger.estimates(ask("probe"), ledger.slots([view]), now)
    return float(found["queue_s"][0])


def test_a_queue_shrinks_as_its_head_is_at_work_and_no_further() -> None:
    ledger, view = Ledger(), instance("a")
    ledger.slots([view])
    first, second = ask("r1", 1000), ask("r2", 500)
    ledger.sent(first, Send("a"), 0.0)
    ledger.sent(second, Send("a"), 0.2)
    assert queue(ledger, view, 0.2) == pytest.approx(1.3, rel=1e-3)
    assert queue(ledger, view, 5.0) == pytest.approx(0.5, rel=1e-3)  # the first is late; the second has not begun
    ledger.first_token(first, 1.0)
    assert queue(ledger, view, 1.1) == pytest.approx(0.4, rel=1e-3)
    ledger.failed(second, 1.2)
    assert queue(ledger, view, 1.2) == 0


def test_what_kernels_read_is_what_the_books_say() -> None:
    ledger = Ledger()
    (slot,) = ledger.slots([instance("a")])
    ledger.slots([instance(f"i{i}") for i in range(100)])  # the rows have moved
    ledger.sent(ask("r1", 1000), Send("a"), 0.0)
    ledger.sent(ask("r2", 500), Send("a"), 0.5)
    ledger.first_token(ask("r1", 1000), 0.75)
    life, row = ledger._lives[slot], ledger._books[slot]
    for name in ("pending_s", "head_s", "since", "requests", "decoding", "kv_used"):
        assert row[name] == getattr(life, name) != 0, name
    found = ledger.estimates(ask("r3"), np.array([slot]), 1.0)
    told = _ROW.unpack_from(ledger._out_rows, 0)
    assert dict(zip(found.dtype.names or (), told, strict=True)) == {name: found[name][0] for name in found.dtype.names}


def test_who_does_not_stream_has_its_first_token_when_it_was_expected() -> None:
    ledger, view = Ledger(), instance("a")
    slots = ledger.slots([view])
    whole = [msgspec.structs.replace(ask(f"w{i}", 1000), streams=False) for i in range(3)]
    for request in whole:
        ledger.sent(request, Send("a"), 0.0)
    assert queue(ledger, view, 0.0) == pytest.approx(3, rel=1e-3)
    assert queue(ledger, view, 2.5) == pytest.approx(0.5, rel=1e-3)
    ledger.sent(whole[0], Send("a"), 2.5)  # it had failed, and comes again
    streamed = ask("s", 1000)
    ledger.sent(streamed, Send("a"), 2.5)
    ledger.first_token(streamed, 5.0)  # nobody asked meanwhile
    assert queue(ledger, view, 5.0) == 0
    assert ledger.in_flight(slots).tolist() == [4]
    ledger.slots([view])
    assert ledger.estimates(ask("p", 1000), slots, 5.0)["compute_s"][0] == pytest.approx(1, rel=1e-2), "it is not slow"
    for request in (*whole, streamed):
        ledger.finished(request, 9.0, 10)
    assert ledger.in_flight(slots).tolist() == [0]
    ledger.estimates(ask("p"), slots, 99.0)
    assert not ledger._untold


def test_a_first_token_that_was_not_to_be_told_counts_once() -> None:
    ledger, view = Ledger(), instance("a")
    slots = ledger.slots([view])
    request, behind = msgspec.structs.replace(ask("r", 1000), streams=False), ask("b", 1000)
    ledger.sent(request, Send("a"), 0.0)
    ledger.sent(behind, Send("a"), 0.0)
    ledger.first_token(request, 0.5)
    ledger.estimates(ask("p"), slots, 99.0)  # when it was expected is over
    ledger.first_token(behind, 99.0)
    ledger.estimates(ask("q"), slots, 99.0)
    for one in (request, behind):
        ledger.finished(one, 100.0, 10)
    assert ledger.in_flight(slots).tolist() == [0]
    assert not ledger._books["decoding"].any()


def test_a_restarted_instance_has_nothing_of_its_last_life() -> None:
    ledger, view = Ledger(), instance("a")
    ledger.slots([view])
    request = ask("r", 1000)
    ledger.sent(request, Send("a"), 0.0)
    again = instance("a")
    assert queue(ledger, again, 0.0) == 0
    assert ledger.in_flight(ledger.slots([again])).tolist() == [0]
    ledger.failed(request, 0.1)
    assert ledger.in_flight(ledger.slots([again])).tolist() == [0]


def test_instances_that_come_and_go_leave_nothing_behind() -> None:
    ledger = Ledger()
    for life in range(400):
        view = [instance("stays"), instance(f"pod-{life}")]
        ledger.slots(view)
        request = ask(f"r{life}")
        ledger.sent(request, Send(f"pod-{life}", "stays"), float(life))
        ledger.first_token(request, life + 0.1)
        ledger.finished(request, life + 0.5, 3)
    assert len(ledger._lives) < 200
    assert len(set(ledger._free)) == len(ledger._free)
    assert not ledger._flights


def test_a_model_of_few_instances_makes_nobody_forget_those_of_another() -> None:
    """Each request is scheduled among the instances of its model alone."""
    ledger, many, one = Ledger(), [instance(f"m{i}") for i in range(100)], [instance("n")]
    ledger.slots(many)
    for i in range(100):
        ledger.sent(ask(f"r{i}"), Send(f"m{i}"), 0.0)
    ledger.slots(one)
    assert ledger.in_flight(ledger.slots(many)).tolist() == [1] * 100


def test_a_disaggregated_request_is_at_both_until_its_first_token() -> None:
    ledger, view = Ledger(), [instance("p", Role.PREFILL), instance("d", Role.DECODE)]
    slots = ledger.slots(view)
    request = ask("r", 100)
    ledger.sent(request, Send("d", "p"), 0.0)
    assert ledger.in_flight(slots).tolist() == [1, 1]
    found = ledger.estimates(ask("probe"), slots, 0.0)
    assert found["queue_s"].tolist() == pytest.approx([0.1, 0.0], rel=1e-3)
    ledger.first_token(request, 0.2)
    assert ledger.in_flight(slots).tolist() == [0, 1]
    ledger.finished(request, 1.0, 10)
    assert ledger.in_flight(slots).tolist() == [0, 0]


def test_reports_add_the_requests_of_others_only() -> None:
    ledger, view = Ledger(), instance("a")
    ledger.slots([view])
    for i in range(3):
        ledger.sent(ask(f"r{i}", 100), Send("a"), 0.0)
    view.running, view.waiting, view.reported_at = 2, 3, 1.0
    assert ledger.in_flight(ledger.slots([view])).tolist() == [5]
    view.queued_prefill_tokens, view.reported_at = 800, 2.0
    assert queue(ledger, view, 2.0) == pytest.approx(0.2 + 0.5, rel=1e-3)
    assert queue(ledger, view, 2.4) == pytest.approx(0.2 + 0.1, rel=1e-3)


def test_a_slower_engine_is_found_out_and_loads_are_not_slowness() -> None:
    def expected(seconds: float, held: dict[str, dict[str, int]]) -> float:
        ledger, view = Ledger(), instance("a")
        for i in range(30):
            request, now = ask(f"r{i}", 1000, held=held), 10.0 * i
            ledger.slots([view])
            ledger.sent(request, Send("a"), now)
            ledger.first_token(request, now + seconds)
            ledger.finished(request, now + seconds + 1, 5)
        return float(ledger.estimates(ask("probe", 500), ledger.slots([view]), 400.0)["ttft_s"][0])

    assert expected(1.0, {}) == pytest.approx(0.5, rel=0.05)
    assert expected(2.0, {}) == pytest.approx(1.0, rel=0.3)
    assert expected(0.55, {"a": {"dram": 500}}) == pytest.approx(0.5, rel=0.05)  # 0.05 of it loads


def test_the_books_grow() -> None:
    ledger = Ledger()
    view = [instance(str(i)) for i in range(200)]
    slots = ledger.slots(view)
    assert len(np.unique(slots)) == 200
    assert (ledger.slots(view) == slots).all()
