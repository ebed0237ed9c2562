"""What holds for every scheduler."""

import heapq
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.plan.schedule.driving import TOKEN_S, ask, instance, send

from cairn.plan.role import Role
from cairn.plan.schedule import SCHEDULERS, Ask, InstanceView, Scheduler, Send, Shed

every_scheduler = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=list(SCHEDULERS))

#: A life of a fleet: who comes and goes, what is asked, and which of the open requests takes its next step.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("turn"), st.integers(0, 5)),
        st.tuples(st.just("ask"), st.integers(1, 6000)),
        st.tuples(st.just("next"), st.integers(0, 20)),
        st.tuples(st.just("fail"), st.integers(0, 20)),
        st.tuples(st.just("restart"), st.integers(0, 5)),
    ),
    max_size=40,
)


@every_scheduler
@settings(max_examples=40, deadline=None)
@given(steps=steps, roles=st.lists(st.sampled_from(list(Role)), min_size=6, max_size=6))
def test_an_instance_that_is_away_is_never_chosen(
    make: Callable[[], Scheduler], steps: list[tuple[str, int]], roles: list[Role]
) -> None:
    scheduler = make()
    view = [instance(str(i), role) for i, role in enumerate(roles)]
    flying: list[tuple[Ask, bool]] = []
    for now, (what, number) in enumerate(steps):
        at = now / 10
        if what == "turn":
            view[number].available = not view[number].available
        elif what == "restart":
            view[number] = instance(str(number), roles[number])
        elif what == "ask":
            request = ask(f"r{now}", number, at=at, held={str(number % 6): {"vram": number // 2}})
            choice = scheduler.choose(request, view, at)
            if isinstance(choice, Send):
                _check(choice, {one.id: one for one in view})
                scheduler.sent(request, choice, at)
                flying.append((request, False))
        elif flying:
            request, started = flying.pop(number % len(flying))
            if what == "fail":
                scheduler.failed(request, at)
            elif started:
                scheduler.finished(request, at, 10)
            else:
                scheduler.first_token(request, at)
                flying.append((request, True))


def _check(choice: Send, view: dict[str, InstanceView]) -> None:
    decode = view[choice.instance_id]
    assert decode.available
    if choice.prefill_on is not None:
        assert choice.prefill_on != choice.instance_id
        assert view[choice.prefill_on].available
        assert view[choice.prefill_on].role is not Role.DECODE
        assert decode.role is not Role.PREFILL


@every_scheduler
def test_nobody_there_is_shed_with_a_reason(make: Callable[[], Scheduler]) -> None:
    scheduler = make()
    for view in ([], [instance("a", available=False)]):
        choice = scheduler.choose(ask("r"), view, 0.0)
        assert isinstance(choice, Shed)
        assert "no instance" in choice.reason
        assert choice.retry_after_s > 0


@every_scheduler
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_where_a_side_has_nobody_the_other_does_everything(make: Callable[[], Scheduler], role: Role) -> None:
    other = Role.PREFILL if role is Role.DECODE else Role.DECODE
    scheduler, view = make(), [instance("a", role), instance("b", other, available=False)]
    choice = send(scheduler, ask("r"), view, 0.0)
    assert (choice.instance_id, choice.prefill_on) == ("a", None)


@every_scheduler
def test_ties_are_broken_fairly(make: Callable[[], Scheduler]) -> None:
    scheduler, view = make(), [instance(str(i)) for i in range(8)]
    chosen: Counter[str] = Counter()
    for i in range(400):
        request = ask(f"r{i}", at=10.0 * i)
        chosen[send(scheduler, request, view, 10.0 * i).instance_id] += 1
        scheduler.first_token(request, 10.0 * i + 0.1)
        scheduler.finished(request, 10.0 * i + 1, 10)
    assert len(chosen) == 8
    assert max(chosen.values()) <= 2 * min(chosen.values()), chosen


@every_scheduler
def test_late_and_unknown_calls_are_ignored(make: Callable[[], Scheduler]) -> None:
    scheduler, view = make(), [instance("a")]
    request = ask("r")
    scheduler.first_token(request, 0.0)
    scheduler.finished(request, 0.0, 3)
    send(scheduler, request, view, 0.0)
    scheduler.failed(request, 0.1)
    scheduler.failed(request, 0.2)
    scheduler.first_token(request, 0.3)
    scheduler.finished(request, 0.4, 3)
    assert isinstance(scheduler.choose(ask("s", at=1.0), view, 1.0), Send)


@every_scheduler
@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 1500), st.floats(0, 1)), min_size=1, max_size=40),
    count=st.integers(1, 5),
)
def test_work_is_conserved(make: Callable[[], Scheduler], prompts: list[tuple[int, float]], count: int) -> None:
    """While an instance is idle and a request can be in time there, nothing waits and nothing is refused.

    Instances take prompts one after the other, and as long as they say.
    """
    scheduler, view = make(), [instance(str(i)) for i in range(count)]
    free = {one.id: 0.0 for one in view}
    ends: list[tuple[float, str, Ask]] = []
    now = 0.0
    for i, (tokens, gap) in enumerate(prompts):
        now += gap
        while ends and ends[0][0] <= now:
            at, _, done = heapq.heappop(ends)
            scheduler.first_token(done, at)
            scheduler.finished(done, at, 1)
        request = ask(f"r{i}", tokens, at=now)
        choice = scheduler.choose(request, view, now)
        assert isinstance(choice, Send) or min(free.values()) > now
        if isinstance(choice, Send):
            scheduler.sent(request, choice, now)
            where = choice.instance_id
            free[where] = max(now, free[where]) + TOKEN_S * tokens
            heapq.heappush(ends, (free[where], request.id, request))


def test_round_robin_takes_turns() -> None:
    scheduler, view = SCHEDULERS["round_robin"](), [instance(str(i)) for i in range(3)]
    chosen = [send(scheduler, ask(f"r{i}"), view, 0.0).instance_id for i in range(6)]
    assert Counter(chosen) == {"0": 2, "1": 2, "2": 2}
    assert chosen[:3] == chosen[3:]


def test_least_loaded_counts_requests_of_its_own_and_of_others() -> None:
    scheduler, view = SCHEDULERS["least_loaded"](), [instance(str(i)) for i in range(3)]
    view[0].running, view[0].reported_at = 5, 1.0
    chosen = Counter(send(scheduler, ask(f"r{i}"), view, 1.0).instance_id for i in range(8))
    assert chosen == {"1": 4, "2": 4}
    view[0].running, view[0].reported_at = 0, 2.0
    assert send(scheduler, ask("next"), view, 2.0).instance_id == "0"


def test_prefix_aware_follows_the_prefix_until_the_fleet_is_out_of_balance() -> None:
    scheduler, view = SCHEDULERS["prefix_aware"](), [instance(str(i)) for i in range(3)]
    held = {"1": {"vram": 90}, "2": {"remote": 90}}
    chosen = Counter(send(scheduler, ask(f"r{i}", held=held), view, 0.0).instance_id for i in range(40))
    assert chosen.most_common(1)[0][0] == "1"
    assert chosen["1"] - min(chosen["0"], chosen["2"]) <= 9
    little = {"1": {"vram": 10}}
    assert send(SCHEDULERS["prefix_aware"](), ask("r", held=little), view[:2], 0.0).instance_id == "1"
