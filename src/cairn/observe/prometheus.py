"""Shows a `Metrics` to Prometheus. Imported only by whoever exports: hot paths know nothing of it."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from cairn.observe.metrics import Counted, Ratio

PREFIX = "cairn_"

Family = CounterMetricFamily | GaugeMetricFamily | SummaryMetricFamily


class MetricsCollector(Collector):
    """Reads a `Metrics` (or another `Counted`) at each scrape; to be registered once with a registry.

    Counters become `cairn_<name>_total{labels}`, ratios a gauge and summaries a summary `cairn_<name>`; figures of
    tiers `cairn_tier_<name>{tier=...}`, a counter where the name ends in `_total` and a gauge elsewhere.
    """

    def __init__(self, metrics: Counted) -> None:
        self._metrics = metrics

    def describe(self) -> Iterator[Family]:
        """Nothing: what the tiers will report is not known before they do."""
        return iter(())

    def collect(self) -> Iterator[Family]:
        for counter in self._metrics.counters:
            family = CounterMetricFamily(PREFIX + counter.name, counter.help, labels=counter.labels)
            samples = counter.samples() or ([((), 0.0)] if not counter.labels else [])
            for values, amount in samples:
                family.add_metric(values, amount)
            yield family
        yield from self._pairs()
        yield from self._tiers()

    def _pairs(self) -> Iterator[Family]:
        for pair in self._metrics.pairs:
            name = PREFIX + pair.name
            if isinstance(pair, Ratio):
                gauge = GaugeMetricFamily(name, pair.help, labels=pair.labels)
                for values, above, below in pair.samples():
                    if below:
                        gauge.add_metric(values, above / below)
                yield gauge
            else:
                summary = SummaryMetricFamily(name, pair.help, labels=pair.labels)
                for values, count, total in pair.samples():
                    summary.add_metric(values, int(count), total)
                yield summary

    def _tiers(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for tier, stats in self._metrics.tiers().items():
            for name, value in stats.items():
                if name not in families:
                    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                    families[name] = kind(f"{PREFIX}tier_{name}", f"{name} of a tier.", labels=("tier",))
                families[name].add_metric((tier,), value)
        yield from families.values()


def exposition(metrics: Counted) -> bytes:
    """The figures in Prometheus' text format (version 0.0.4)."""
    registry = CollectorRegistry()
    registry.register(MetricsCollector(metrics))
    return generate_latest(registry)
