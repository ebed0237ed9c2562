"""Cairn's figures among vLLM's own: taken from the scheduler's side, carried by vLLM, shown by its /metrics.

Names are those of `cairn.observe.prometheus`, labels vLLM's (`model_name`, `engine`) and Cairn's behind them. Only the
scheduler's side counts, for all ranks together, so there is nothing to add up between ranks.
"""

from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from cairn.observe.metrics import Metrics
from cairn.observe.prometheus import PREFIX

#: Amounts by name and values of the labels, as they travel: [name, [value, ...], amount].
Samples = list[tuple[str, list[str], float]]

_COUNTS, _LEVELS = "counts", "levels"
_TOTAL: Final = "_total"


@dataclass
class CairnStats(KVConnectorStats):  # type: ignore[misc]
    """What was counted since the last look ("counts") and figures that have changed since ("levels"), as Samples.

    Plain lists, because vLLM sends `data` from process to process.
    """

    def __post_init__(self) -> None:
        self.data.setdefault(_COUNTS, [])
        self.data.setdefault(_LEVELS, [])

    def reset(self) -> None:
        self.data: dict[str, Any] = {_COUNTS: [], _LEVELS: []}

    def is_empty(self) -> bool:
        return not self.data[_COUNTS] and not self.data[_LEVELS]

    def aggregate(self, other: KVConnectorStats) -> "CairnStats":
        """Both in one: counts add up, of levels the later holds."""
        counts: dict[tuple[str, ...], float] = {}
        levels: dict[tuple[str, ...], float] = {}
        for data in (self.data, other.data):
            for name, labels, amount in data[_COUNTS]:
                counts[name, *labels] = counts.get((name, *labels), 0) + amount
            levels |= {(name, *labels): level for name, labels, level in data[_LEVELS]}
        return CairnStats({_COUNTS: _samples(counts), _LEVELS: _samples(levels)})

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line."""
        sums: dict[str, float] = {}
        for name, labels, amount in self.data[_COUNTS]:
            key = " ".join([name, *labels]) if name != "miss_tokens" else name
            sums[key] = sums.get(key, 0) + amount
        shown = ("hit_tokens", "miss_tokens", "stored_tokens", "transfer_bytes", "failures")
        return {f"{PREFIX}{key}": amount for key, amount in sums.items() if key.startswith(shown)}


class StatsSource:
    """What an engine's Metrics have counted since the last `take`. A few microseconds when nothing has changed."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last: dict[tuple[str, ...], float] = {}
        self._first = True

    def take(self) -> CairnStats | None:
        """None when nothing was counted: then the tiers have hardly changed, and are not asked."""
        counts: dict[tuple[str, ...], float] = {}
        for counter in self._metrics.counters:
            for labels, total in counter.samples():
                self._difference((counter.name, *labels), total, counts)
        if not counts and not self._first:
            return None
        self._first = False
        levels: dict[tuple[str, ...], float] = {}
        for tier, figures in self._metrics.tiers().items():
            for name, figure in figures.items():
                key = (f"tier_{name.removesuffix(_TOTAL)}", tier)
                if name.endswith(_TOTAL):
                    self._difference(key, figure, counts)
                elif self._last.get(key) != figure:
                    self._last[key] = levels[key] = figure
        return CairnStats({_COUNTS: _samples(counts), _LEVELS: _samples(levels)})

    def _difference(self, key: tuple[str, ...], total: float, counts: dict[tuple[str, ...], float]) -> None:
        before = self._last.get(key, 0)
        if total != before:
            counts[key] = total - before
            self._last[key] = total


class CairnPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Shows CairnStats to Prometheus; lives in vLLM's front end."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _unregister()
        self._counters: dict[str, Any] = {}
        self._gauges: dict[str, Any] = {}
        for counter in Metrics().counters:
            self._counters[counter.name] = self._counter_cls(
                name=PREFIX + counter.name, documentation=counter.help, labelnames=[*labelnames, *counter.labels]
            )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for name, labels, amount in transfer_stats_data[_COUNTS]:
            if name not in self._counters:
                self._counters[name] = self._of_tier(self._counter_cls, name)
            self._counters[name].labels(*engine, *labels).inc(amount)
        for name, labels, level in transfer_stats_data[_LEVELS]:
            if name not in self._gauges:
                self._gauges[name] = self._of_tier(self._gauge_cls, name, multiprocess_mode="mostrecent")
            self._gauges[name].labels(*engine, *labels).set(level)

    def _of_tier(self, kind: Any, name: str, **options: Any) -> Any:
        described = f"{name.removeprefix('tier_')} of a tier."
        return kind(name=PREFIX + name, documentation=described, labelnames=[*self._labelnames, "tier"], **options)


def _samples(amounts: dict[tuple[str, ...], float]) -> Samples:
    return [(name, list(map(str, labels)), amount) for (name, *labels), amount in amounts.items()]


def _unregister() -> None:
    """Takes an earlier engine's metrics out of this process's registry, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if str(getattr(collector, "_name", "")).startswith(PREFIX):
            REGISTRY.unregister(collector)
