"""The circuit breaker, on a clock that stands still until it is told."""

import pytest

from cairn.tier.breaker import Breaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(threshold=3, cooldown_seconds=1.0, longest_seconds=5.0, clock=clock)
    for _ in range(3):
        breaker.failure()
    return breaker


def test_only_failures_in_a_row_open_it(clock: Clock) -> None:
    breaker = Breaker(threshold=3, clock=clock)
    for _ in range(5):
        breaker.failure()
        breaker.failure()
        breaker.success()
    assert breaker.closed
    assert breaker.allow()
    assert breaker.opened == 0


def test_open_it_allows_nothing_until_the_rest_is_over(clock: Clock) -> None:
    breaker = opened(clock)
    assert not breaker.closed
    clock.now += 0.999
    assert not breaker.ready()
    assert not breaker.allow()
    clock.now += 0.002
    assert breaker.ready()


def test_one_probe_at_a_time_and_asking_takes_none(clock: Clock) -> None:
    breaker = opened(clock)
    clock.now += 1
    assert breaker.ready()
    assert breaker.ready()
    assert breaker.allow()
    assert not breaker.allow()
    assert not breaker.ready()


def test_a_good_probe_closes_it_and_forgets(clock: Clock) -> None:
    breaker = opened(clock)
    clock.now += 1
    assert breaker.allow()
    breaker.success()
    assert breaker.closed
    breaker.failure()
    breaker.failure()
    assert breaker.closed
    breaker.failure()
    assert not breaker.closed
    assert breaker.opened == 2
    clock.now += 1
    assert breaker.allow()  # the rest is the first one again


def test_bad_probes_double_the_rest_up_to_the_bound(clock: Clock) -> None:
    breaker = opened(clock)
    for rest in (1.0, 2.0, 4.0, 5.0, 5.0):
        clock.now += rest - 0.01
        assert not breaker.allow()
        clock.now += 0.02
        assert breaker.allow()
        breaker.failure()
    assert breaker.opened == 1


def test_a_probe_that_never_reports_is_given_up(clock: Clock) -> None:
    breaker = opened(clock)
    clock.now += 1
    assert breaker.allow()
    clock.now += 0.5
    assert not breaker.allow()
    clock.now += 0.5
    assert breaker.allow()


def test_late_results_change_nothing_while_it_is_open(clock: Clock) -> None:
    breaker = opened(clock)
    breaker.success()
    breaker.failure()
    assert not breaker.closed
    clock.now += 1
    assert breaker.allow()
