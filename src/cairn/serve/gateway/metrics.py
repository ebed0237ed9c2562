"""What the gateway shows to Prometheus."""

import time
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cairn.observe.metrics import Counted, Counter, Histogram
from cairn.observe.prometheus import MetricsCollector
from cairn.serve.dashboard import Traffic
from cairn.serve.gateway.asked import CHAT, COMPLETIONS
from cairn.serve.gateway.members import Members

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
#: Engines that are gone of which failures are shown still.
_GONE: Final = 256
_TOKEN_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class GatewayMetrics(Counted):
    """Counts requests, and shows all that is counted. For one event loop; `exposition` from any thread."""

    def __init__(self, members: Members, others: Iterable[Counted | Collector] = ()) -> None:
        """others: what is shown beside, of the registry and the index."""
        self._requests = Counter("serve_requests", "Requests, by how they ended.", "path", "status")
        self._failures = Counter("serve_engine_failures", "Attempts that an engine failed.", "instance", "reason")
        self.retried = Counter("serve_retries", "Requests sent to another engine, of which the client had nothing yet.")
        self.resumed = Counter("serve_resumed", "Streams that another engine was asked to go on with.")
        self.broken = Counter("serve_broken", "Streams that ended with an error, as nobody could go on.")
        self.shed = Counter("serve_shed", "Requests that the scheduler refused.")
        self.handed_over = Counter("serve_prefills", "Prompts computed by one engine for another.")
        self._seconds = Histogram(
            "serve_request_seconds", "From the request's body to the answer's last byte.", buckets=_SECONDS
        )
        self._ttft = Histogram(
            "serve_ttft_seconds", "From the request's body to the answer's first event.", buckets=_SECONDS
        )
        self._tpot = Histogram(
            "serve_tpot_seconds", "Mean between two events of a stream, by stream.", buckets=_TOKEN_SECONDS
        )
        super().__init__()
        self.traffic = Traffic()
        self._members = members
        self._failed: dict[str, None] = {}  # instances, in the order of their first failures
        self.registry = CollectorRegistry()
        for one in (*others, _Standing(members), self):
            self.registry.register(MetricsCollector(one) if isinstance(one, Counted) else one)

    def ended(self, path: str, status: int) -> None:
        """A request has ended; status 499: its client has left."""
        self._requests.count(path, str(status))
        if path in (COMPLETIONS, CHAT) and (status == 429 or status >= 500):
            self.traffic.failed += 1

    def failed(self, instance: str, reason: str) -> None:
        self._failures.count(instance, reason)
        self._failed.setdefault(instance)
        if len(self._failed) > len(self._members.members) + _GONE:
            oldest = next(name for name in self._failed if name not in self._members.members)
            del self._failed[oldest]
            self._failures.forget("instance", oldest)

    def timed(self, since: float, first: float, latest: float, events: int) -> None:
        """An answer has come to its end. Times by `time.monotonic`; first: 0.0: it was no stream."""
        self._seconds.observe(time.monotonic() - since)
        if first:
            self._ttft.observe(first - since)
            if events > 1:
                self._tpot.observe((latest - first) / (events - 1))

    def exposition(self) -> bytes:
        """In Prometheus' text format (version 0.0.4)."""
        return generate_latest(self.registry)


class _Standing(Collector):
    """How the engines stand, read at each scrape."""

    def __init__(self, members: Members) -> None:
        self._members = members

    def describe(self) -> Iterator[GaugeMetricFamily]:
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        running = GaugeMetricFamily("cairn_serve_running", "Requests at an engine.", labels=("instance",))
        queued = GaugeMetricFamily("cairn_serve_queued_tokens", "Of prompts, to be computed.", labels=("instance",))
        ready = GaugeMetricFamily("cairn_serve_ready", "0: rests after a failure, or drains.", labels=("instance",))
        now = time.monotonic()
        for member in [*self._members.members.values()]:
            running.add_metric((member.name,), member.running)
            queued.add_metric((member.name,), member.queued)
            ready.add_metric((member.name,), float(member.ready(now) and not member.drains))
        waiting = GaugeMetricFamily("cairn_serve_waiting", "Queue: requests that wait for an engine with room.")
        waiting.add_metric((), self._members.waiting)
        yield from (running, queued, ready, waiting)
