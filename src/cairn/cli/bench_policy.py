"""The bench behind `cairn bench policy`: hit rates of the eviction policies on a trace, beside LRU and Belady."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cairn.index import DEFAULT_POLICY, POLICIES
from cairn.sim.belady import belady
from cairn.sim.replay import replay
from cairn.sim.trace import read_trace

CAPACITIES = (1_000, 3_000, 10_000, 30_000, 50_000)


def run_policy(
    trace: Path, capacities: Sequence[int] = CAPACITIES, policies: Sequence[str] = tuple(POLICIES)
) -> dict[str, Any]:
    """Block hit rates in percent of all block uses, and which share of LRU's distance to Belady a policy makes up.

    Raises InputError for a trace that cannot be read.
    """
    requests = read_trace(trace)
    by_capacity: dict[str, Any] = {}
    for capacity in capacities:
        hits = {
            name: replay(requests, capacity, POLICIES[name]).hit_blocks
            for name in {"lru": 0, **dict.fromkeys(policies)}
        }
        best = int(belady(requests, capacity).sum())
        gap = best - hits["lru"]
        by_capacity[str(capacity)] = {
            "hit_percent": {
                name: _percent(count, requests.block_uses) for name, count in {**hits, "belady": best}.items()
            },
            "gap_closed_percent": {
                name: _percent(count - hits["lru"], gap) for name, count in hits.items() if name != "lru"
            },
        }
    return {
        "trace": trace.name,
        "requests": len(requests),
        "block_uses": requests.block_uses,
        "distinct_blocks": len(requests.keys),
        "default_policy": DEFAULT_POLICY,
        "capacity_blocks": by_capacity,
    }


def _percent(part: int, whole: int) -> float | None:
    return round(100 * part / whole, 2) if whole else None
