"""Shows a `Metrics` to Prometheus. Imported only by whoever exports: hot paths know nothing of it."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from cairn.observe.figures import TIER_FIGURES
from cairn.observe.http import METRICS_HEADERS, Answer, Page
from cairn.observe.metrics import Counted

PREFIX = "cairn_"

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class MetricsCollector(Collector):
    """Reads a `Metrics` (or another `Counted`) at each scrape; to be registered once with a registry.

    Counters become `cairn_<name>_total{labels}`, ratios a gauge and histograms a histogram `cairn_<name>`; figures of
    tiers `cairn_tier_<name>{tier=...}`, a counter where the name ends in `_total` and a gauge elsewhere.
    """

    def __init__(self, metrics: Counted) -> None:
        self._metrics = metrics

    def describe(self) -> Iterator[Family]:
        """Nothing: what the tiers will report is not known before they do."""
        return iter(())

    def collect(self) -> Iterator[Family]:
        yield from families(self._metrics)


class PoolsCollector(Collector):
    """As `MetricsCollector`, for several at once, told apart by the label `pool`. pools: those that there are now."""

    def __init__(self, pools: Callable[[], Mapping[str, Counted]]) -> None:
        self._pools = pools

    def describe(self) -> Iterator[Family]:
        return iter(())

    def collect(self) -> Iterator[Family]:
        together: dict[str, Family] = {}
        for pool, metrics in self._pools().items():
            for family in families(metrics, pool=pool):
                together.setdefault(family.name, family)
                if together[family.name] is not family:
                    together[family.name].samples += family.samples
        yield from together.values()


def families(metrics: Counted, **constant: str) -> Iterator[Family]:
    """Everything as it stands now. constant: further labels of every sample."""
    names, given = tuple(constant), tuple(constant.values())
    for counter in metrics.counters:
        counted = CounterMetricFamily(PREFIX + counter.name, counter.help, labels=counter.labels + names)
        for values, amount in counter.samples() or ([((), 0.0)] if not counter.labels else []):
            counted.add_metric(values + given, amount)
        yield counted
    for ratio in metrics.ratios:
        gauge = GaugeMetricFamily(PREFIX + ratio.name, ratio.help, labels=ratio.labels + names)
        for values, amount in ratio.samples():
            gauge.add_metric(values + given, amount)
        yield gauge
    for one in metrics.histograms:
        bounds = [*map(str, one.buckets), "+Inf"]
        histogram = HistogramMetricFamily(PREFIX + one.name, one.help, labels=one.labels + names)
        unseen = [] if one.labels else [((), [0.0] * (len(one.buckets) + 2))]
        for values, (*cases, total) in one.samples() or unseen:
            buckets = zip(bounds, itertools.accumulate(cases), strict=True)
            histogram.add_metric(values + given, list(buckets), total)
        yield histogram
    yield from _of_tiers(metrics.tiers(), names, given)


def _of_tiers(
    tiers: Mapping[str, Mapping[str, float]], names: tuple[str, ...], given: tuple[str, ...]
) -> Iterable[Family]:
    found: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for tier, stats in tiers.items():
        for name, value in stats.items():
            if name not in found:
                found[name] = tier_family(name, *names)
            found[name].add_metric((tier, *given), value)
    return found.values()


def tier_family(name: str, *names: str) -> CounterMetricFamily | GaugeMetricFamily:
    """What a figure of a tier is shown as. names: of further labels."""
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return kind(f"{PREFIX}tier_{name}", TIER_FIGURES.get(name, f"{name} of a tier."), labels=("tier", *names))


def exposition(*shown: Counted | Collector) -> bytes:
    """All figures in Prometheus' text format (version 0.0.4)."""
    registry = CollectorRegistry()
    for one in shown:
        registry.register(MetricsCollector(one) if isinstance(one, Counted) else one)
    return generate_latest(registry)


def metrics_page(shown: Counted | Collector) -> Page:
    """All figures, made anew for everybody who asks."""
    return lambda _: Answer(METRICS_HEADERS, exposition(shown))
