"""Cairn's figures among vLLM's own: taken from the scheduler's side, carried by vLLM, shown by its /metrics.

Names are those of `cairn.observe.prometheus`, labels vLLM's (`model_name`, `engine`) and Cairn's behind them. Only the
scheduler's side counts, for all ranks together, so there is nothing to add up between ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from cairn.observe.metrics import Counter, Histogram, Metrics, Ratio
from cairn.observe.prometheus import PREFIX, tier_family

#: By name and values of the labels, as they travel: [name, [value, ...], amount], or a histogram's cell instead of it.
Samples = list[tuple[str, list[str], Any]]
_Key = tuple[str, ...]

_COUNTS, _LEVELS, _CELLS = "counts", "levels", "cells"
_TOTAL: Final = "_total"


@dataclass
class CairnStats(KVConnectorStats):  # type: ignore[misc]
    """What was counted since the last look ("counts", and "cells" of histograms, see `Histogram.samples`) and figures
    that have changed since ("levels"), as Samples.

    Plain lists, because vLLM sends `data` from process to process.
    """

    def __post_init__(self) -> None:
        for kind in (_COUNTS, _LEVELS, _CELLS):
            self.data.setdefault(kind, [])

    def reset(self) -> None:
        self.data: dict[str, Any] = {_COUNTS: [], _LEVELS: [], _CELLS: []}

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> "CairnStats":
        """Both in one: counts add up, of levels the later holds."""
        counts: dict[_Key, float] = {}
        levels: dict[_Key, float] = {}
        cells: dict[_Key, list[float]] = {}
        for data in (self.data, other.data):
            for name, labels, amount in data[_COUNTS]:
                counts[name, *labels] = counts.get((name, *labels), 0) + amount
            levels |= {(name, *labels): level for name, labels, level in data[_LEVELS]}
            for name, labels, cell in data[_CELLS]:
                before = cells.get((name, *labels), [0.0] * len(cell))
                cells[name, *labels] = [a + b for a, b in zip(before, cell, strict=True)]
        return _stats(counts, levels, cells)

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
        self._last: dict[_Key, float] = {}
        self._last_cells: dict[_Key, list[float]] = {}
        self._first = True

    def take(self) -> CairnStats | None:
        """None when nothing was counted: then the tiers have hardly changed, and are not asked."""
        counts: dict[_Key, float] = {}
        for counter in self._metrics.counters:
            for labels, total in counter.samples():
                self._difference((counter.name, *labels), total, counts)
        if not counts and not self._first:
            return None
        self._first = False
        levels: dict[_Key, float] = {}
        for ratio in self._metrics.ratios:
            for labels, figure in ratio.samples():
                self._level((ratio.name, *labels), figure, levels)
        for tier, figures in self._metrics.tiers().items():
            for name, figure in figures.items():
                key = (f"tier_{name.removesuffix(_TOTAL)}", tier)
                if name.endswith(_TOTAL):
                    self._difference(key, figure, counts)
                else:
                    self._level(key, figure, levels)
        return _stats(counts, levels, self._cells())

    def _cells(self) -> dict[_Key, list[float]]:
        found: dict[_Key, list[float]] = {}
        for histogram in self._metrics.histograms:
            for labels, cell in histogram.samples():
                key = histogram.name, *labels
                before = self._last_cells.get(key, [0.0] * len(cell))
                if cell != before:
                    found[key] = [a - b for a, b in zip(cell, before, strict=True)]
                    self._last_cells[key] = cell
        return found

    def _level(self, key: _Key, figure: float, levels: dict[_Key, float]) -> None:
        if self._last.get(key) != figure:
            self._last[key] = levels[key] = figure

    def _difference(self, key: _Key, total: float, counts: dict[_Key, float]) -> None:
        """A total that went back has begun anew, as a node's does when it is started again."""
        before = self._last.get(key, 0)
        if total != before:
            counts[key] = total - before if total > before else total
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
        metrics = Metrics()
        self._counters = {one.name: self._shown(self._counter_cls, one) for one in metrics.counters}
        self._gauges = {
            one.name: self._shown(self._gauge_cls, one, multiprocess_mode="mostrecent") for one in metrics.ratios
        }
        self._histograms = {
            one.name: self._shown(self._histogram_cls, one, buckets=one.buckets) for one in metrics.histograms
        }

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
        for name, labels, (*cases, total) in transfer_stats_data[_CELLS]:
            child = self._histograms[name].labels(*engine, *labels)
            for bucket, count in zip(child._buckets, cases, strict=True):  # there is no way to hand over many at once
                bucket.inc(count)
            child._sum.inc(total)

    def _shown(self, kind: Any, one: Counter | Ratio | Histogram, **options: Any) -> Any:
        labels = [*self._labelnames, *one.labels]
        return kind(name=PREFIX + one.name, documentation=one.help, labelnames=labels, **options)

    def _of_tier(self, kind: Any, name: str, **options: Any) -> Any:
        growing = kind is self._counter_cls
        family = tier_family(name.removeprefix("tier_") + (_TOTAL if growing else ""))
        labels = [*self._labelnames, "tier"]
        return kind(name=PREFIX + name, documentation=family.documentation, labelnames=labels, **options)


def _stats(counts: dict[_Key, float], levels: dict[_Key, float], cells: dict[_Key, list[float]]) -> CairnStats:
    return CairnStats({_COUNTS: _samples(counts), _LEVELS: _samples(levels), _CELLS: _samples(cells)})


def _samples(amounts: Mapping[_Key, Any]) -> Samples:
    return [(name, list(map(str, labels)), amount) for (name, *labels), amount in amounts.items()]


def _unregister() -> None:
    """Takes an earlier engine's metrics out of this process's registry, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if str(getattr(collector, "_name", "")).startswith(PREFIX):
            REGISTRY.unregister(collector)
