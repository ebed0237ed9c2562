"""Belady's bound against exhaustive search, and above every policy."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.index import POLICIES
from cairn.sim.belady import belady
from cairn.sim.replay import replay
from cairn.sim.trace import Trace

#: Small prefix-closed requests: a path in a tree of two children a node; the id of a node is its path read as a number.
paths = st.lists(st.integers(0, 1), min_size=1, max_size=3)
requests = st.lists(paths, min_size=1, max_size=7)


def trace_of(chosen: list[list[int]]) -> Trace:
    chains = [[int("1" + "".join(map(str, path[: i + 1])), 2) for i in range(len(path))] for path in chosen]
    return Trace.of([float(i) for i in range(len(chains))], chains)


def best_possible(trace: Trace, capacity: int) -> int:
    """The most leading hits of any schedule, by trying them all: a request leaves any subset of what was there."""
    chains = [trace.blocks[trace.starts[i] : trace.starts[i + 1]].tolist() for i in range(len(trace))]

    @cache
    def from_here(i: int, held: frozenset[int]) -> int:
        if i == len(chains):
            return 0
        chain = chains[i]
        hits = next((at for at, block in enumerate(chain) if block not in held), len(chain))
        there = sorted(held | set(chain))
        best = 0
        for mask in range(1 << len(there)):
            if mask.bit_count() <= capacity:
                kept = frozenset(block for at, block in enumerate(there) if mask >> at & 1)
                best = max(best, from_here(i + 1, kept))
        return hits + best

    return from_here(0, frozenset())


@settings(max_examples=40, deadline=None)
@given(chosen=requests, capacity=st.integers(1, 3))
def test_belady_is_the_best_there_is(chosen: list[list[int]], capacity: int) -> None:
    trace = trace_of(chosen)
    assert int(belady(trace, capacity).sum()) == best_possible(trace, capacity)


@settings(max_examples=60, deadline=None)
@given(chosen=st.lists(paths, min_size=1, max_size=40), capacity=st.integers(1, 8), chunk=st.sampled_from([0, 1, 2]))
@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_is_above_belady(policy: str, chosen: list[list[int]], capacity: int, chunk: int) -> None:
    trace = trace_of(chosen)
    assert replay(trace, capacity, POLICIES[policy], chunk).hit_blocks <= belady(trace, capacity).sum()
