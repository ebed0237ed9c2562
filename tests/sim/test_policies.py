"""How good the policies are: on a slice of a real trace and on synthetic patterns, beside LRU and Belady."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from tests.sim.workloads import WORKLOADS, trace_of

from cairn.cli.bench_policy import run_policy
from cairn.index import LRU, Tenure
from cairn.sim.replay import replay
from cairn.sim.trace import Trace, read_trace

SLICE = Path(__file__).parents[1] / "data" / "conversation_2000.jsonl"

#: Shares of LRU's distance to Belady that Tenure must make up on the slice, in percent. There, most of its time goes by
#: before it has learned anything; over the whole trace it makes up 28, 32 and 17 %.
FLOORS = {1_000: 15.0, 3_000: 18.0, 10_000: 0.0}


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(SLICE)


def test_the_bench_reports_every_policy() -> None:
    result = run_policy(SLICE, capacities=tuple(FLOORS))
    for capacity, floor in FLOORS.items():
        figures = result["capacity_blocks"][str(capacity)]
        assert figures["gap_closed_percent"]["tenure"] >= floor, figures
        assert figures["hit_percent"]["tenure"] >= figures["hit_percent"]["lru"]
        assert figures["hit_percent"]["belady"] == max(figures["hit_percent"].values())


@pytest.mark.parametrize("capacity", [1_000, 3_000])
def test_lru_is_lru(trace: Trace, capacity: int) -> None:
    """Against the plainest possible one: blocks in a dict, a request's tail older than its root."""
    order: OrderedDict[int, None] = OrderedDict()
    hits = []
    for i in range(len(trace)):
        chain = trace.blocks[trace.starts[i] : trace.starts[i + 1]].tolist()
        hits.append(next((at for at, block in enumerate(chain) if block not in order), len(chain)))
        for block in reversed(chain):
            order[block] = None
            order.move_to_end(block)
        while len(order) > capacity:
            order.popitem(last=False)
    assert replay(trace, capacity, LRU, chunk=0).hits.tolist() == hits


def test_the_clock_does_not_matter(trace: Trace) -> None:
    """An engine's clock may stand still or run evenly; Tenure counts requests for blocks."""
    expected = replay(trace, 1_000, Tenure).hit_blocks
    for times in (np.zeros(len(trace)), np.arange(len(trace), dtype=float)):
        same = Trace(
            times, trace.starts, trace.blocks, trace.keys, trace.input_tokens, trace.output_tokens, trace.asked
        )
        assert replay(same, 1_000, Tenure).hit_blocks == expected


@pytest.mark.parametrize("workload", WORKLOADS)
def test_tenure_is_not_worse_than_lru(workload: str) -> None:
    """But for what learning costs where LRU is as good as it gets, and unlearning where the pattern changes."""
    trace = trace_of(workload, 4000)
    for capacity in (200, 600, 2000):
        lru = 100 * replay(trace, capacity, LRU).hit_blocks / trace.block_uses
        tenure = 100 * replay(trace, capacity, Tenure).hit_blocks / trace.block_uses
        assert tenure >= lru - max(1.0, 0.04 * lru), f"{capacity} blocks: LRU {lru:.1f} %, Tenure {tenure:.1f} %"


def test_tenure_keeps_part_of_a_loop() -> None:
    trace = trace_of("loop", 4000)
    assert replay(trace, 600, LRU).hit_blocks == 0
    assert replay(trace, 600, Tenure).hit_blocks > 0.2 * trace.block_uses


def test_touching_a_request_twice_changes_little(trace: Trace) -> None:
    """An engine touches what it loads, and again when it stores; that is one use."""
    from cairn.index import PrefixIndex

    def hits(again: int) -> int:
        index, total = PrefixIndex(3_000, Tenure), 0
        for now, keys in zip(trace.times, map(trace.chain, range(len(trace))), strict=True):
            first = index.touch(keys, now)
            total += first
            for _ in range(again):
                index.touch(keys, now)
            index.commit(keys, first, index.reserve(len(keys) - first, now), now)
        return total

    assert hits(2) >= 0.9 * hits(0)
