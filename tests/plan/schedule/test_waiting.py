"""The waiting room: least slack first, nobody passed over for ever."""

from hypothesis import given
from hypothesis import strategies as st
from tests.plan.schedule.driving import ask

from cairn.plan.schedule import Ask, WaitingRoom


def test_the_least_slack_is_first_and_higher_priorities_before_it() -> None:
    room = WaitingRoom()
    late, early = ask("late", at=1.0, slo=2.0), ask("early", at=1.5, slo=1.0)
    first = Ask(id="first", prompt_tokens=1, arrived=2.0, priority=1)
    for request in (late, first, early):
        room.put(request, 3.0)
    assert room.next() == 3.0
    assert room.due(2.9) == []
    assert [one.id for one in room.due(3.0)] == ["first", "early", "late"]
    room.put(early, 4.0)
    room.remove(first)
    room.remove(first)
    assert [one.id for one in room.due(3.0)] == ["late"]
    assert [one.id for one in room.due(4.0)] == ["early", "late"]
    assert len(room) == 2


@given(
    arrivals=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.5, 2.0, 10.0])), min_size=1, max_size=60),
    served=st.integers(1, 3),
)
def test_nobody_starves(arrivals: list[tuple[int, float]], served: int) -> None:
    """Of those who wait, the ones who are due first go: whoever overtakes a request was due before it."""
    room = WaitingRoom()
    coming = [ask(f"r{i}", at=float(at), slo=slo) for i, (at, slo) in enumerate(sorted(arrivals))]
    now = 0.0
    while coming or len(room):
        while coming and coming[0].arrived <= now:
            room.put(coming.pop(0), now)
        waiting = room.due(now)
        for request in waiting[:served]:
            room.remove(request)
        left = [request.arrived + request.ttft_slo_s for request in waiting[served:]]
        assert all(one.arrived + one.ttft_slo_s <= min(left, default=99.0) for one in waiting[:served])
        now += 1.0
    assert now <= 10 + len(arrivals) / served + 1
