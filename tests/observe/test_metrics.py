"""Counters: sums that are right under threads, and what Prometheus and `get_stats` see of them."""

import json
import subprocess
import sys
import threading

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cairn.observe.metrics import Counter, Histogram, Metrics, Ratio, Ticks
from cairn.observe.prometheus import MetricsCollector, exposition
from cairn.observe.reasons import Reason


def scraped(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """What a Prometheus server reads, by name and labels."""
    families = text_string_to_metric_families(exposition(metrics).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_counter_sums_by_its_labels() -> None:
    counter = Counter("moves", "Moves.", "tier", "direction")
    counter.add(2, tier="dram", direction="load")
    counter.add(3, direction="load", tier="dram")
    counter.add(tier="disk", direction="load")
    assert counter.value(tier="dram", direction="load") == 5
    assert counter.value(direction="load") == 6
    assert counter.value() == 6
    assert counter.value(tier="vram") == 0
    assert counter.figures() == {"dram": {"load": 5}, "disk": {"load": 1}}


def test_a_label_left_out_is_an_error() -> None:
    with pytest.raises(KeyError, match="tier"):
        Metrics().hit_tokens.add(1)


def test_no_count_is_lost_between_threads() -> None:
    counter = Counter("hits", "Hits.", "tier")
    barrier = threading.Barrier(4)

    def count() -> None:
        barrier.wait(10)
        for _ in range(20_000):
            counter.add(1, tier="dram")

    threads = [threading.Thread(target=count) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert counter.value() == 80_000


def test_the_snapshot_holds_every_figure_and_is_json() -> None:
    metrics = Metrics()
    metrics.lookups.add()
    metrics.hit_tokens.add(48, tier="dram")
    metrics.miss_tokens.add(16, reason=Reason.ABSENT)
    metrics.transferred("disk", "load", 4096, 0.25)
    metrics.transferred("disk", "load", 4096, 0.25)
    metrics.watch("disk", lambda: {"resident_blocks": 7})
    snapshot = metrics.snapshot()
    assert json.loads(json.dumps(snapshot)) == snapshot
    assert snapshot["lookups"] == 1
    assert snapshot["hit_tokens"] == {"dram": 48}
    assert snapshot["miss_tokens"] == {"absent": 16}
    assert snapshot["transfers"] == {"disk": {"load": 2}}
    assert snapshot["transfer_bytes"] == {"disk": {"load": 8192}}
    assert snapshot["transfer_seconds"] == {"disk": {"load": 0.5}}
    assert snapshot["tiers"] == {"disk": {"resident_blocks": 7}}


def test_a_snapshot_does_not_change_later() -> None:
    metrics = Metrics()
    figures = {"resident_blocks": 1.0}
    metrics.watch("disk", lambda: figures)
    metrics.hit_tokens.add(1, tier="dram")
    before = metrics.snapshot()
    metrics.hit_tokens.add(1, tier="dram")
    figures["resident_blocks"] = 2.0
    assert before["hit_tokens"] == {"dram": 1}
    assert before["tiers"] == {"disk": {"resident_blocks": 1.0}}


def test_prometheus_reads_what_was_counted() -> None:
    metrics = Metrics()
    metrics.hit_tokens.add(48, tier="dram")
    metrics.miss_tokens.add(16, reason=Reason.CHEAPER_TO_RECOMPUTE)
    metrics.transferred("disk", "store", 1 << 30, 0.5)
    metrics.watch("disk", lambda: {"resident_blocks": 7, "corrupt_total": 2})
    metrics.watch("dram", lambda: {"resident_blocks": 3})
    samples = scraped(metrics)
    assert samples["cairn_lookups_total", ()] == 0
    assert samples["cairn_hit_tokens_total", (("tier", "dram"),)] == 48
    assert samples["cairn_miss_tokens_total", (("reason", "cheaper_to_recompute"),)] == 16
    store = (("direction", "store"), ("tier", "disk"))
    assert samples["cairn_transfer_bytes_total", store] == 1 << 30
    assert samples["cairn_transfer_seconds_total", store] == 0.5
    assert samples["cairn_tier_resident_blocks", (("tier", "disk"),)] == 7
    assert samples["cairn_tier_resident_blocks", (("tier", "dram"),)] == 3
    assert samples["cairn_tier_corrupt_total", (("tier", "disk"),)] == 2


def test_types_and_help_are_exported() -> None:
    metrics = Metrics()
    metrics.watch("disk", lambda: {"resident_blocks": 7, "corrupt_total": 2})
    families = {family.name: family for family in text_string_to_metric_families(exposition(metrics).decode())}
    assert families["cairn_hit_tokens"].type == "counter"
    assert families["cairn_tier_resident_blocks"].type == "gauge"
    assert families["cairn_tier_corrupt"].type == "counter"
    assert all(family.documentation for family in families.values())


def test_a_registry_takes_the_collector_before_the_tiers_are_known() -> None:
    metrics = Metrics()
    registry = CollectorRegistry(auto_describe=True)
    registry.register(MetricsCollector(metrics))
    metrics.watch("disk", lambda: {"resident_blocks": 7})
    assert b'cairn_tier_resident_blocks{tier="disk"} 7.0' in generate_latest(registry)


def test_engines_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.hit_tokens.add(1, tier="dram")
    assert other.hit_tokens.value() == 0


def test_counting_needs_no_prometheus_client() -> None:
    code = "import sys, cairn.observe.metrics, cairn.observe.log; assert 'prometheus_client' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_ticks_of_threads_all_count() -> None:
    ticks = Ticks("t", "help")
    barrier = threading.Barrier(4)

    def count() -> None:
        barrier.wait(10)
        for _ in range(20_000):
            ticks.tick()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert ticks.value() <= 80_000
    for thread in threads:
        thread.join(60)
    ticks.add(5)
    assert ticks.value() == ticks.value() == ticks.figures() == 80_005
    assert ticks.samples() == [((), 80_005)]


def test_a_histogram_counts_in_buckets() -> None:
    histogram = Histogram("h", "help", "tier", buckets=(0.5, 1.0))
    for amount in (0.25, 0.5, 0.75, 2.0):
        histogram.observe(amount, tier="disk")
    histogram.observe(0.75, 3, tier="remote")
    assert dict(histogram.samples()) == {("disk",): [2, 1, 1, 3.5], ("remote",): [0, 3, 0, 2.25]}
    assert histogram.sums(tier="disk") == (4, 3.5)
    assert histogram.sums() == (7, 5.75)
    assert histogram.figures() == {"disk": {"count": 4, "sum": 3.5}, "remote": {"count": 3, "sum": 2.25}}


def test_prometheus_reads_ratios_and_histograms() -> None:
    metrics = Metrics()
    metrics.compression.add(300, 100, tier="remote")
    metrics.compression.add(100, 100, tier="remote")
    metrics.decompression.observe(0.002, tier="remote")
    metrics.decompression.observe(100.0, tier="remote")
    samples = scraped(metrics)
    assert samples["cairn_compression_ratio", (("tier", "remote"),)] == 2
    name, tier = "cairn_decompression_duration_seconds", ("tier", "remote")
    assert samples[f"{name}_bucket", (("le", "0.001"), tier)] == 0
    assert samples[f"{name}_bucket", (("le", "0.0025"), tier)] == 1
    assert samples[f"{name}_bucket", (("le", "10.0"), tier)] == 1
    assert samples[f"{name}_bucket", (("le", "+Inf"), tier)] == samples[f"{name}_count", (tier,)] == 2
    assert samples[f"{name}_sum", (tier,)] == 100.002


def test_what_has_no_labels_is_shown_before_anything_is_counted() -> None:
    shown = scraped(Metrics())
    assert shown["cairn_lookups_total", ()] == 0
    assert shown["cairn_layerwise_load_latency_seconds_count", ()] == 0


def test_counting_by_values_is_adding_by_labels() -> None:
    counter = Counter("requests", "Requests.", "path", "status")
    counter.count("/v1", "200")
    counter.add(2, path="/v1", status="200")
    counter.count("/v1", "500")
    assert counter.value(path="/v1", status="200") == 3
    assert counter.value(status="500") == 1


def test_a_ratio_without_a_denominator_is_none() -> None:
    ratio = Ratio("r", "help", "tier")
    ratio.add(5, 0, tier="remote")
    assert ratio.samples() == []
    assert ratio.value() == 0.0
