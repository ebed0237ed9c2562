"""What a registrar makes of the tiers that an engine tells of in its /metrics."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from cairn.cluster import CacheState, TierState
from cairn.cluster.cache_metrics import cache_of
from cairn.cluster.engine_metrics import parse
from cairn.cluster.values import encode
from cairn.observe.metrics import Metrics
from cairn.observe.prometheus import exposition


def counted(**tiers: dict[str, float]) -> Metrics:
    metrics = Metrics()
    metrics.hit_tokens.add(48, tier="dram")
    metrics.hit_tokens.add(16, tier="disk")
    metrics.miss_tokens.add(5, reason="absent")
    metrics.miss_tokens.add(3, reason="partial_block")
    metrics.transferred("dram", "load", 4096, 0.5)
    metrics.transferred("dram", "store", 1024, 0.5)
    for tier, figures in tiers.items():
        metrics.watch(tier, lambda figures=figures: figures)  # type: ignore[misc]
    return metrics


DRAM = {"capacity_bytes": 1000, "capacity_blocks": 10, "resident_blocks": 4}
DISK = {"capacity_bytes": 5000, "capacity_blocks": 50, "resident_blocks": 5, "written_bytes": 777}


def told(metrics: Metrics, *others: bytes) -> CacheState | None:
    return cache_of(parse(b"".join([exposition(metrics), *others]).decode()).cache, "1", 12.0)


@pytest.mark.parametrize("connected", [None, 0, 1])
def test_tiers_are_told_with_what_they_hold_and_do(connected: int | None) -> None:
    tiers: dict[str, Any] = {"dram": DRAM, "disk": DISK}
    if connected is not None:
        tiers["node"] = {"connected": connected, "sessions": 3}
    shared = connected == 1
    dram = TierState(
        tier="dram",
        capacity_bytes=1000,
        used_bytes=400,
        blocks=4,
        hit_tokens=48,
        load_bytes=4096,
        store_bytes=1024,
        shared=shared,
    )
    disk = TierState(
        tier="disk",
        capacity_bytes=5000,
        used_bytes=500,
        blocks=5,
        hit_tokens=16,
        store_bytes=777 if shared else 0,
        shared=shared,
    )
    missed = {"absent": 5, "partial_block": 3}
    found = told(counted(**tiers))
    assert found == CacheState(incarnation="1", time=12.0, tiers=(disk, dram), missed_tokens=missed)


def test_an_engines_own_prefix_cache_is_the_tier_in_vram() -> None:
    registry = CollectorRegistry()
    hits = Counter("vllm:prefix_cache_hits", "Tokens.", ("model_name", "engine"), registry=registry)
    hits.labels("m", "0").inc(100)
    hits.labels("m", "1").inc(11)
    found = told(counted(), generate_latest(registry))
    assert found
    assert {tier.tier: tier.hit_tokens for tier in found.tiers} == {"disk": 16, "dram": 48, "vram": 111}


def test_who_tells_nothing_of_a_cache_has_no_state() -> None:
    assert cache_of(parse("vllm:num_requests_running 3\n").cache, "1", 0.0) is None


def test_what_is_told_is_bounded() -> None:
    metrics = counted(**{f"tier{i}": DRAM for i in range(50)})
    for i in range(500):
        metrics.miss_tokens.add(i, reason=f"{i} " + "x" * 2000)
    found = told(metrics)
    assert found
    assert len(found.tiers) == 16
    assert len(found.missed_tokens) == 64
    assert encode(found)
