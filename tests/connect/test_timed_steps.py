"""What the planner learns from an engine's steps: which are timed, and that none is lost while a GPU is behind."""

from cairn.connect.vllm.movers import Timer
from cairn.connect.vllm.timed_steps import StepTimers, TimedSteps
from cairn.plan import CostModel, Segment, Work, plan_load

BLOCK = 16


def chosen(steps: list[dict[str, int]], computed: dict[str, int] | None = None) -> list[Work | None]:
    """computed: tokens that requests have KV of once a step is over; 1,000 unless said."""
    known = computed or {}
    timed = TimedSteps(BLOCK)

    def upto(request: str) -> int | None:
        return None if request == "unknown" else known.get(request, 1000)

    return [timed.work(step, upto) for step in steps]


def test_prefills_are_timed_and_one_step_without_any_behind_each() -> None:
    prefill, decode = Work.of([(500, 500)]), Work.of([(1, 999)])
    found = chosen([{}, {"a": 1}, {"a": 500}, {"a": 1}, {"a": 1}, {"a": 500}, {"a": 500}, {}, {"a": 1}, {"a": 1}])
    assert found == [None, None, prefill, decode, None, prefill, prefill, None, decode, None]


def test_steps_that_are_not_known_or_read_much_are_left_out_and_the_next_one_is_timed() -> None:
    steps = [{"a": 500}, {"unknown": 1}, {"long": 1}, {"a": 1, "b": 1}, {"a": 1}]
    found = chosen(steps, {"a": 1000, "b": 2000, "long": 20_000})
    assert found == [Work.of([(500, 500)]), None, None, Work.of([(1, 999), (1, 1999)]), None]


class Late(Timer):
    """Over when it is told so."""

    def __init__(self, seconds: float) -> None:
        self.stopped = self.over = False
        self._seconds = seconds

    def stop(self) -> None:
        self.stopped = True

    def seconds(self) -> float | None:
        assert self.stopped
        return self._seconds if self.over else None


def test_a_step_is_reported_though_others_have_begun_before_it_is_over() -> None:
    timers, steps = StepTimers(), [Late(1.0), Late(2.0)]
    for number, step in enumerate(steps):
        timers.begin(Work(number, 0), step)
        timers.stop()
        timers.stop()  # vLLM ends a step in two calls, of which either may be left out
        assert timers.next() is None
    for step in steps:
        step.over = True
    assert [timers.next(), timers.next(), timers.next()] == [(Work(0, 0), 1.0), (Work(1, 0), 2.0), None]


def test_a_step_that_has_failed_is_not_reported() -> None:
    timers, failed, next_one = StepTimers(), Late(1.0), Late(2.0)
    timers.begin(Work(0, 0), failed)
    timers.begin(Work(1, 0), next_one)
    assert timers.next() is None
    timers.stop()
    next_one.over = True
    assert timers.next() == (Work(1, 0), 2.0)
    assert timers.next() is None


def test_a_slow_start_does_not_pass_for_what_every_step_costs() -> None:
    """As measured on an H200 while a second engine warmed up on it; loads as where four engines share the bus."""
    cost = CostModel()
    for tokens, pairs, seconds in ((4096, 8388608, 0.2036), (3616, 65782272, 0.315), (8192, 33554432, 0.2093)):
        cost.recompute.observe(Work(tokens, pairs), seconds)
    for size, seconds in ((2097152, 0.028), (536870912, 0.076), (2621440000, 0.25)):
        cost.observe_load("dram", size, seconds)
    held = [Segment("dram", 8192)]
    assert plan_load(held, 8192, 1 << 17, cost).tokens == 0
    cost.recompute.observe(Work(1, 4096), 0.02)
    assert plan_load(held, 8192, 1 << 17, cost).tokens == 8192
