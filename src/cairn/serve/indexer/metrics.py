"""What the service shows to Prometheus: requests, the index, and what the way of events counts."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cairn.fleet import FleetIndex
from cairn.fleet.metrics import FleetMetrics
from cairn.observe.prometheus import MetricsCollector
from cairn.serve.indexer.following import Following

_BUCKETS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 4.0, 8.0)

#: Of `Stats`, what only grows, with what it says.
_GROWING = {
    "evicted": "Blocks that the index's bound took.",
    "orphans": "Blocks stored behind a parent that the source does not hold.",
    "unknown": "Blocks named in events that the source does not hold.",
    "malformed": "Blocks of events that contradict themselves.",
    "doubles": "Blocks that the source held under another name.",
    "uncounted": "Copies of blocks beyond those that are counted.",
}
_STANDING = {
    "blocks": "Distinct blocks known.",
    "worker_blocks": "Pairs of a block and a source that holds it.",
    "sets": "Different sets of holders.",
    "sources": "Sources that hold something.",
    "bytes": "Memory that the index uses.",
}


class IndexMetrics:
    """Counts requests, and shows all that is counted. Thread-safe."""

    def __init__(self, index: FleetIndex, following: Following, fleet: FleetMetrics) -> None:
        self.registry = CollectorRegistry()
        #: What is known of index and events, for other registries too.
        self.collectors: tuple[Collector, ...] = (MetricsCollector(fleet), _Standing(index, following))
        for collector in self.collectors:
            self.registry.register(collector)
        self._seconds = Histogram(
            "cairn_index_request_seconds",
            "Time of a request, its body's coming included.",
            ["request"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._requests = Counter(
            "cairn_index_requests", "Requests, by how they ended.", ["request", "status"], registry=self.registry
        )
        self._tokens = Counter("cairn_index_query_tokens", "Tokens of prompts asked for.", registry=self.registry)

    def observe(self, request: str, status: str, seconds: float) -> None:
        """A request has ended. request: one of a few names, the path without its slash or a method of gRPC's."""
        self._seconds.labels(request).observe(seconds)
        self._requests.labels(request, status).inc()

    def queried(self, tokens: int) -> None:
        self._tokens.inc(tokens)

    def exposition(self) -> bytes:
        """In Prometheus' text format (version 0.0.4)."""
        return generate_latest(self.registry)


class _Standing(Collector):
    """How the index and its publishers stand, read at each scrape."""

    def __init__(self, index: FleetIndex, following: Following) -> None:
        self._index, self._following = index, following

    def describe(self) -> Iterator[GaugeMetricFamily]:
        return iter(())

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        stats = self._index.stats()._asdict()
        for name, text in _STANDING.items():
            yield GaugeMetricFamily(f"cairn_index_{name}", text, value=stats[name])
        for name, text in _GROWING.items():
            yield CounterMetricFamily(f"cairn_index_{name}_blocks", text, value=stats[name])
        connected = GaugeMetricFamily(
            "cairn_index_connected", "1: connected to the publisher.", labels=("instance", "rank")
        )
        for state in self._following.states():
            source = state.source
            rank = state.instance.rank if source is None else source.rank
            connected.add_metric((state.instance.name, str(rank)), float(state.connected))
        yield connected
