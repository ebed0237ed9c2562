"""Cairn's figures on their way to vLLM's metrics: differences, added up, shown under the names of Cairn's own page."""

from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest

from cairn.config import load_config
from cairn.connect.vllm.stats import CairnPromMetrics, CairnStats, StatsSource
from cairn.engine.core import EngineCore
from cairn.kv import KVGeometry, Namespace
from cairn.observe.metrics import Metrics
from cairn.observe.prometheus import exposition
from cairn.observe.reasons import Reason


class Config:
    kv_transfer_config = None


def shown(takes: list[Any]) -> set[str]:
    """What vLLM's page shows of these, its own label left out."""
    kinds = {kind: kind for kind in (Counter, Gauge, Histogram)}
    collector = CairnPromMetrics(Config(), kinds, ["engine"], {0: ["0"]})
    for stats in takes:
        collector.observe(stats.data)
    page = samples(generate_latest(REGISTRY))
    return {line.replace('{engine="0"}', "").replace('engine="0",', "") for line in page}


def samples(page: bytes) -> set[str]:
    """Without the lines that say when a counter was made."""
    lines = page.decode().splitlines()
    return {line for line in lines if line.startswith("cairn_") and "_created" not in line}


def test_the_page_is_that_of_cairn_itself() -> None:
    """Taken piece by piece, over the wire, and by an engine that follows another in this process."""
    metrics, takes = Metrics(), []
    metrics.identity.add(1, 1, model="m", revision="xxh3:1", geometry="2 layers")
    figures = {"resident_blocks": 3.0, "evicted_blocks_total": 0.0}
    metrics.watch("dram", lambda: dict(figures))
    source = StatsSource(metrics)
    for i in range(4):
        metrics.lookups.add()
        metrics.hit_tokens.add(48, tier="dram")
        if i % 2:
            metrics.miss_tokens.add(16, reason=Reason.ABSENT)
            metrics.transferred("disk", "load", 4096, 0.25)
            metrics.compression.add(3000 * i, 1000, tier="remote")
            metrics.decompression.observe(0.003 * i, tier="remote")
            figures["evicted_blocks_total"] += 5
        metrics.layerwise.observe(0.001 * i, 4)
        figures["resident_blocks"] += i
        stats = source.take()
        assert stats is not None
        takes.append(CairnStats(msgspec.msgpack.decode(msgspec.msgpack.encode(stats.to_dict()))))
    assert shown(takes) == samples(exposition(metrics))
    whole = takes[0].aggregate(takes[1]).aggregate(takes[2].aggregate(takes[3]))
    assert shown([whole]) == samples(exposition(metrics))


def test_every_figure_of_the_real_tiers_can_be_shown(tmp_path: Path) -> None:
    geometry = KVGeometry(layers=1, kv_heads=1, head_dim=8, dtype="float16", block_tokens=16)
    settings = {"storage.cpu.size": "1MiB", "storage.disk.path": str(tmp_path), "storage.disk.size": "1MiB"}
    with EngineCore(Namespace(model="m", geometry=geometry), load_config(overrides=settings)) as engine:
        stats = StatsSource(engine.metrics).take()
        assert stats is not None
        page = shown([stats])
        assert 'cairn_tier_pinned_blocks{tier="dram"} 0.0' in page
        # Counters that stand at zero are not sent.
        wanted = samples(exposition(engine.metrics))
        assert page <= wanted
        assert {line for line in wanted - page if not line.endswith(" 0.0")} == set()


def test_a_node_that_begins_anew_counts_on() -> None:
    """A negative amount would end vLLM's server."""
    metrics, takes = Metrics(), []
    figures = {"calls_total": 0.0}
    metrics.watch("node", lambda: dict(figures))
    source = StatsSource(metrics)
    for total in (7.0, 2.0, 0.0, 3.0):
        figures["calls_total"] = total
        metrics.lookups.add()
        takes.append(source.take())
    assert 'cairn_tier_calls_total{tier="node"} 12.0' in shown(takes)


def test_nothing_new_is_nothing() -> None:
    metrics = Metrics()
    source = StatsSource(metrics)
    first = source.take()
    assert first is not None
    assert first.is_empty()
    assert source.take() is None
    metrics.hit_tokens.add(32, tier="disk")
    second = source.take()
    assert second is not None
    assert not second.is_empty()
    assert second.reduce() == {"cairn_hit_tokens disk": 32}
    assert source.take() is None
