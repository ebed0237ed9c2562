"""The simulated fleet: against cases small enough to be worked out by hand."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.sim.test_policies import SLICE

from cairn.errors import InputError
from cairn.plan.cost import RecomputeCost, Work
from cairn.plan.schedule import SCHEDULERS, Ask, Choice, InstanceView, RoundRobin, Shed, Wait
from cairn.sim.fleet import FleetSettings, FleetSim
from cairn.sim.machine import H200_8B, Link, Machine
from cairn.sim.outcome import Outcome
from cairn.sim.trace import Trace, read_trace

#: A thousandth of a second a token, at least ten a step; twenty tokens a step; loads take a hundredth of computing.
TINY = Machine(
    floor_s=0.01,
    token_s=1e-3,
    attention_s=0.0,
    read_s=0.0,
    token_bytes=1,
    blocks=16,
    block_tokens=10,
    chunk=20,
    running=4,
    links={"dram": Link(0.0, 1e6), "disk": Link(0.0, 1e5), "remote": Link(0.0, 1e5)},
)
ALONE = FleetSettings(instances=1, machine=TINY, blocks={}, eviction="lru")


def run(
    requests: Sequence[tuple[float, list[int], int, int]],
    settings: FleetSettings = ALONE,
    scheduler: RoundRobin | None = None,
) -> Outcome:
    """requests: when, block ids, tokens of the prompt and of the answer. The last one only sets the time's scale."""
    requests = [*requests, (100.0, [999], 5, 1)]
    trace = Trace.of([at for at, *_ in requests], [ids for _, ids, *_ in requests], [(p, a) for *_, p, a in requests])
    return FleetSim(trace, scheduler or RoundRobin(), len(requests) / 100.0, settings).run()


def test_a_prompt_in_chunks_and_its_answer() -> None:
    outcome = run([(0.0, [0, 1, 2, 3], 35, 3)])
    assert outcome.first[0] == pytest.approx(0.020 + 0.015)
    assert outcome.last[0] == pytest.approx(0.035 + 2 * 0.010)
    assert outcome.ttft_s[0] == pytest.approx(0.035)
    assert outcome.tbt_s[0] == pytest.approx(0.010)
    assert outcome.computed_tokens == 35 + 5


def test_what_is_cached_is_not_computed() -> None:
    outcome = run([(0.0, [0, 1, 2, 3], 35, 1), (1.0, [0, 1, 2, 9], 38, 1), (2.0, [0, 1, 2, 9], 38, 1)])
    assert outcome.ttft_s[1] == pytest.approx(0.010)  # 8 tokens
    assert outcome.ttft_s[2] == pytest.approx(0.010)  # one at least
    assert outcome.computed_tokens == 35 + 8 + 1 + 5


def test_prefills_share_a_step_and_decodes_go_first() -> None:
    outcome = run([(0.0, [9], 10, 1), (0.005, [0, 1], 15, 2), (0.005, [5, 6], 15, 1)])
    assert outcome.first[1] == pytest.approx(0.010 + 0.020)  # 15 and 5
    assert outcome.first[2] == pytest.approx(0.030 + 0.011)  # 10, beside one decode
    assert outcome.last[1] == pytest.approx(0.041)


def test_a_request_waits_until_its_kv_has_room() -> None:
    """Five blocks: three of each prompt and one of each answer."""
    settings = replace(ALONE, machine=replace(TINY, blocks=5))
    outcome = run([(0.0, [0, 1, 2], 25, 4), (0.0, [5, 6, 7], 25, 4)], settings)
    assert outcome.last[0] == pytest.approx(0.030 + 3 * 0.010)
    assert outcome.first[1] == pytest.approx(0.060 + 0.030)


def test_attention_and_reads_cost() -> None:
    machine = replace(TINY, floor_s=0.0, attention_s=1e-5, read_s=1e-4)
    outcome = run([(0.0, [0, 1, 2, 3], 40, 3)], replace(ALONE, machine=machine))
    prefill = 40 * 1e-3 + 1e-5 * 40 * 20
    assert outcome.first[0] == pytest.approx(prefill)
    assert outcome.last[0] == pytest.approx(prefill + 2e-3 + 1e-4 * (40 + 41))


def test_another_instance_loads_from_the_shared_tier() -> None:
    settings = replace(ALONE, instances=2, blocks={"remote": 64})
    outcome = run([(0.0, [0, 1, 2, 3], 40, 1), (1.0, [0, 1, 2, 3], 40, 1)], settings)
    assert outcome.ttft_s[0] == pytest.approx(0.040)
    assert outcome.ttft_s[1] == pytest.approx(39e-5 + 0.010)
    assert outcome.loaded_tokens == 39
    apart = run([(0.0, [0, 1, 2, 3], 40, 1), (1.0, [0, 1, 2, 3], 40, 1)], replace(settings, blocks={}))
    assert apart.ttft_s[1] == pytest.approx(0.040)


def test_what_costs_more_to_load_is_computed() -> None:
    machine = replace(TINY, links={"remote": Link(0.0, 500.0)})
    settings = replace(ALONE, instances=2, blocks={"remote": 64}, machine=machine)
    outcome = run([(0.0, [0, 1, 2, 3], 40, 1), (1.0, [0, 1, 2, 3], 40, 1)], settings)
    assert outcome.ttft_s[1] == pytest.approx(0.040)
    assert outcome.loaded_tokens == 0


def test_nobody_waits_for_anothers_load() -> None:
    """The second request loads for 0.039 s; the third comes meanwhile and is computed at once."""
    machine = replace(TINY, links={"remote": Link(0.0, 1e3)}, token_s=2e-3)
    settings = replace(ALONE, instances=2, blocks={"remote": 64}, machine=machine)
    requests = [(0.0, [0, 1, 2, 3], 40, 1), (1.0, [0, 1, 2, 3], 40, 1), (1.001, [8], 1, 1), (1.002, [9], 10, 1)]
    outcome = run(requests, settings)
    assert outcome.ttft_s[1] == pytest.approx(0.039 + 0.010)
    assert outcome.ttft_s[3] == pytest.approx(0.020)


class _Fussy(RoundRobin):
    """Lets the first request wait twice, and refuses the second."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, float]] = []

    def choose(self, request: Ask, view: Sequence[InstanceView], now: float) -> Choice:
        self.asked.append((request.id, now))
        if request.id == "0" and now < 0.2:
            return Wait(now + 0.1)
        return Shed(1.0, "no") if request.id == "1" else super().choose(request, view, now)


def test_requests_that_wait_and_requests_that_are_shed() -> None:
    scheduler = _Fussy()
    outcome = run([(0.0, [0], 10, 1), (0.05, [1], 10, 1)], scheduler=scheduler)
    assert [(name, round(at, 6)) for name, at in scheduler.asked[:4]] == [("0", 0), ("1", 0.05), ("0", 0.1), ("0", 0.2)]
    assert outcome.ttft_s[0] == pytest.approx(0.21)
    assert np.isnan(outcome.ttft_s[1])
    assert outcome.good(2.0, 0.1) == 2
    assert outcome.good(0.1, 0.1) == 1


@pytest.mark.parametrize(
    ("blocks", "tokens", "says"), [(1, 0, "input_length"), (20, 200, "21 blocks: an instance has 16")]
)
def test_traces_that_cannot_be_run(blocks: int, tokens: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        run([(0.0, list(range(blocks)), tokens, 1)])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_request_ends(name: str) -> None:
    trace = read_trace(SLICE, limit=300)
    settings = FleetSettings(instances=4, blocks={"remote": 500}, machine=replace(H200_8B, blocks=300))
    outcome = FleetSim(trace, SCHEDULERS[name](), 8.0, settings).run()
    served = ~np.isnan(outcome.first)
    assert (outcome.last[served] >= outcome.first[served]).all()
    assert (outcome.first[served] > outcome.arrived[served]).all()
    assert np.isnan(outcome.last[~served]).all()
    assert outcome.prompt_tokens == trace.input_tokens[served].sum()


def test_slo_awareness_pays() -> None:
    """The bar of the whole trace and 64 instances (docs/benchmarks.md), on a slice and 16."""
    trace = read_trace(SLICE, limit=800)
    settings = FleetSettings(instances=16, blocks={"remote": 4_000})
    good = {name: FleetSim(trace, one(), 30.0, settings).run().good(2.0, 0.1) for name, one in SCHEDULERS.items()}
    assert good["slo_aware"] >= 1.3 * good["round_robin"], good
    assert good["slo_aware"] > max(good["least_loaded"], good["prefix_aware"]), good


def test_the_machine_is_the_one_that_was_measured() -> None:
    results = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "ttft_vllm.json").read_text())
    fit = RecomputeCost()
    measured = [row["contenders"]["none"] | {"tokens": row["tokens"]} for row in results["lengths"]]
    for row in measured:
        for seconds in row["all_cold_s"]:
            fit.observe(Work.of([(row["tokens"], 0)]), seconds)
    _, token_s, attention_s = fit.coefficients()
    assert H200_8B.token_s == pytest.approx(token_s, rel=0.01)
    assert H200_8B.attention_s == pytest.approx(attention_s, rel=0.01)
    assert H200_8B.floor_s == pytest.approx(measured[0]["gpu_hit_s"], rel=0.05)


def test_tiers_are_loaded_from_the_nearest_first() -> None:
    """Two blocks fit DRAM, where the prompt's head stays; the next is on disk, the last remote."""
    machine = replace(TINY, prefix_cache=False)
    settings = replace(ALONE, machine=machine, blocks={"dram": 2, "disk": 3, "remote": 9})
    outcome = run([(0.0, [0, 1, 2, 3], 40, 1), (1.0, [0, 1, 2, 3], 40, 1)], settings)
    assert outcome.held_tokens == {"dram": 20, "disk": 10, "remote": 9}
    assert outcome.ttft_s[1] == pytest.approx(20e-6 + 10e-5 + 9e-5 + 0.010)


@pytest.mark.parametrize(("per_host", "loaded"), [(1, 0), (2, 39)])
def test_instances_of_a_host_share_its_dram(per_host: int, loaded: int) -> None:
    settings = replace(ALONE, instances=2, per_host=per_host, blocks={"dram": 64})
    outcome = run([(0.0, [0, 1, 2, 3], 40, 1), (1.0, [0, 1, 2, 3], 40, 1)], settings)
    assert outcome.loaded_tokens == loaded


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_known_answer_is_found_by_the_next_turn(prefix_cache: bool) -> None:
    """Prompt of two blocks, answer of one; the next turn says all of it again, and a block more."""
    trace = Trace.of([0.0, 1.0, 9.0], [[0, 1, 2], [0, 1, 2, 3], [9]], [(20, 10), (40, 1), (5, 1)], [2, 4, 1], 10)
    machine = replace(TINY, prefix_cache=prefix_cache)
    outcome = FleetSim(trace, RoundRobin(), 3 / 9, replace(ALONE, machine=machine, blocks={"dram": 64})).run()
    assert outcome.held_tokens == {"vram" if prefix_cache else "dram": 30}
