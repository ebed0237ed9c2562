"""Runs of steps as one event, against the same instance taken step by step."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.test_fleet import TINY

import cairn.sim.fleet
from cairn.plan.schedule import RoundRobin
from cairn.sim.fleet import FleetSettings, FleetSim
from cairn.sim.instance import Run, SimInstance
from cairn.sim.outcome import Outcome
from cairn.sim.trace import Trace


class StepByStep(SimInstance):
    """The oracle: each step is an event."""

    def _next(self, now: float) -> Run:
        batch = len(self._decoding)
        computed, attended = self._share(max(0, self._machine.chunk - batch))
        self.computed_tokens += computed
        work = self._machine.work_s(computed, attended, batch, self._read)
        return Run(now, 1, work, 0.0, self._machine.floor_s, False)


requests = st.lists(
    st.tuples(st.floats(0, 3), st.integers(0, 3), st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=14
)


def outcome(asked: list[tuple[float, int, int, int]], **machine: float) -> Outcome:
    """Each asks for the first blocks of one of four documents."""
    # No arrival at the very end of a step: which of the two comes first is a matter of rounding.
    rows = [(at * math.pi / 3 + i * 1.4142e-5, *rest) for i, (at, *rest) in enumerate(asked)]
    rows.append((12.0, 9, 5, 1))
    chains = [[100 * document + i for i in range(-(-prompt // 10))] for _, document, prompt, _ in rows]
    trace = Trace.of([at for at, *_ in rows], chains, [(prompt, answer) for *_, prompt, answer in rows])
    # With room for all: a request that waits for room asks the policy anew at every step.
    made = replace(TINY, blocks=400, **machine)
    fleet = FleetSettings(instances=2, machine=made, blocks={"dram": 7, "remote": 40}, eviction="lru")
    span = max(trace.times) - min(trace.times)
    return FleetSim(trace, RoundRobin(), len(rows) / span, fleet).run()


@pytest.mark.parametrize(
    "machine",
    [
        {"read_s": 1e-4, "attention_s": 1e-5},
        {"read_s": 1e-3, "floor_s": 0.05},
        {"fixed_s": 0.004, "links": {"dram": TINY.links["disk"], "remote": TINY.links["disk"]}, "token_s": 3e-3},
    ],
)
@settings(max_examples=40, deadline=None)
@given(asked=requests)
def test_runs_change_nothing(machine: dict[str, float], asked: list[tuple[float, int, int, int]]) -> None:
    fast = outcome(asked, **machine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cairn.sim.fleet, "SimInstance", StepByStep)
        slow = outcome(asked, **machine)
    assert np.allclose(fast.first, slow.first)
    assert np.allclose(fast.last, slow.last)
    assert fast.computed_tokens == slow.computed_tokens
    assert fast.held_tokens == slow.held_tokens


@given(work=st.floats(0.001, 1), growth=st.floats(0, 0.1), floor=st.floats(0, 2), steps=st.integers(1, 60))
def test_the_time_of_a_run_is_the_sum_of_its_steps(work: float, growth: float, floor: float, steps: int) -> None:
    run = Run(3.0, steps, work, growth, floor, True)
    each = [max(floor, work + k * growth) for k in range(steps)]
    ends = 3.0 + np.cumsum(each)
    assert np.allclose([run.end(k + 1) for k in range(steps)], ends)
    at = float(ends[steps // 2]) - 1e-6
    assert run.until(at).steps == steps // 2 + 1
