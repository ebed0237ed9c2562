"""The dashboard for Grafana, made from a table of panels; the alerts' thresholds are drawn where there is one."""

import json
from collections.abc import Iterator
from typing import Any, Final

_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3


class Panel:
    """queries: (PromQL, what its lines are called). unit: by Grafana's name. alert: where a line is drawn."""

    def __init__(self, title: str, unit: str, *queries: tuple[str, str], alert: float | None = None) -> None:
        self.title, self.unit, self.queries, self.alert = title, unit, queries, alert


_JOB: Final = '{job=~"$job"}'
#: The engine that a metric is about; `instance` is whom Prometheus has scraped.
_OF: Final = "exported_instance"


def _legend(*by: str) -> str:
    return " ".join(f"{{{{{label}}}}}" for label in by)


def _both(metric: str, *by: str) -> tuple[tuple[str, str], ...]:
    """Median and 99th percentile of a histogram."""
    rate = f"sum by ({', '.join(('le', *by))}) (rate({metric}_bucket{_JOB}[$__rate_interval]))"
    shares = {"p50": 0.5, "p99": 0.99}
    return tuple(
        (f"histogram_quantile({share}, {rate})", f"{name} {_legend(*by)}".strip()) for name, share in shares.items()
    )


def _rate(metric: str, *by: str) -> tuple[str, str]:
    """A counter a second."""
    return f"sum by ({', '.join(by)}) (rate({metric}{_JOB}[$__rate_interval]))", _legend(*by)


def _level(metric: str, *by: str, of: str = "sum") -> tuple[str, str]:
    """A gauge."""
    return f"{of} by ({', '.join(by)}) ({metric}{_JOB})", _legend(*by) or metric


_SPEED: Final = (
    f"sum by (tier, direction) (rate(cairn_transfer_bytes_total{_JOB}[$__rate_interval]))"
    f" / sum by (tier, direction) (rate(cairn_transfer_seconds_total{_JOB}[$__rate_interval]))"
)
_BLENDED: Final = (
    'sum(rate(cairn_blend_hits_total{job=~"$job", unit="chunks"}[$__rate_interval]))'
    ' / sum(rate(cairn_blend_lookups_total{job=~"$job", unit="chunks"}[$__rate_interval]))'
)

ROWS: Final[dict[str, tuple[Panel, ...]]] = {
    "Service": (
        Panel("Time to the first token", "s", *_both("cairn_serve_ttft_seconds"), alert=4),
        Panel("Time per output token", "s", *_both("cairn_serve_tpot_seconds")),
        Panel("Requests by status", "reqps", _rate("cairn_serve_requests_total", "status")),
        Panel("Requests at engines", "short", _level("cairn_serve_running", _OF)),
        Panel("Waiting", "short", _level("cairn_serve_waiting"), _level("cairn_serve_queued_tokens", _OF)),
        Panel("Failures of engines", "short", _rate("cairn_serve_engine_failures_total", _OF, "reason")),
    ),
    "Reuse": (
        Panel("Share of tokens that are hits", "percentunit", ("job:cairn_hit_ratio:rate30m" + _JOB, "{{job}}")),
        Panel("Hits by tier", "short", _rate("cairn_hit_tokens_total", "tier")),
        Panel("Misses by reason", "short", _rate("cairn_miss_tokens_total", "reason")),
        Panel("Stored tokens", "short", _rate("cairn_stored_tokens_total", "tier")),
        Panel("Not stored, by reason", "short", _rate("cairn_skipped_tokens_total", "tier", "reason")),
        Panel("Chunks found to blend", "percentunit", (_BLENDED, "found"), alert=0.2),
    ),
    "Tiers": (
        Panel("Blocks in each tier", "short", _level("cairn_tier_resident_blocks", "tier")),
        Panel("Evictions", "short", _rate("cairn_tier_evicted_blocks_total", "tier")),
        Panel("Bandwidth while moving", "Bps", (_SPEED, "{{tier}} {{direction}}")),
        Panel("Batches under way", "short", _level("cairn_tier_batches_under_way", "tier")),
        Panel("Blocks that wait to be written", "short", _level("cairn_tier_write_queue_blocks", "tier")),
        Panel("Failures by reason", "short", _rate("cairn_failures_total", "tier", "reason")),
        Panel(
            "Open circuit breakers",
            "short",
            _level("cairn_tier_breaker_open", "instance", "tier", of="max"),
            (_level("cairn_tier_write_breaker_open", "instance", "tier", of="max")[0], "{{instance}} {{tier}} stores"),
        ),
        Panel("Decoding an object", "s", *_both("cairn_decompression_duration_seconds", "tier"), alert=0.25),
        Panel("Compression", "short", _level("cairn_compression_ratio", "tier", of="avg")),
        Panel("Loading one layer", "s", *_both("cairn_layerwise_load_latency_seconds"), alert=0.05),
        Panel("Free space", "bytes", _level("cairn_tier_filesystem_free_bytes", "instance", "tier", of="min")),
        Panel("Sessions at nodes", "short", _level("cairn_tier_sessions", "instance", of="max")),
    ),
    "Index": (
        Panel("Lag of events", "s", *_both("cairn_fleet_event_lag_seconds", _OF), alert=2),
        Panel("Events", "short", _rate("cairn_fleet_events_total", _OF)),
        Panel("Publishers", "short", _level("cairn_index_connected", _OF, of="min")),
        Panel("Blocks known", "short", _level("cairn_index_blocks"), _level("cairn_index_worker_blocks")),
        Panel("Time of a request", "s", *_both("cairn_index_request_seconds", "request")),
        Panel("Sources dropped", "short", _rate("cairn_fleet_drops_total", _OF, "reason")),
    ),
}


def render() -> str:
    """The dashboard's JSON; the same text each time."""
    job = {
        "name": "job",
        "type": "query",
        "datasource": _SOURCE,
        "query": 'label_values({__name__=~"cairn_.+"}, job)',
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }
    whole = {
        "uid": "cairn",
        "title": "Cairn",
        "tags": ["cairn"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}, job]},
        "panels": list(_panels()),
    }
    return json.dumps(whole, indent=1) + "\n"


_SOURCE: Final = {"type": "prometheus", "uid": "${source}"}


def _panels() -> Iterator[dict[str, Any]]:
    """Rows of three."""
    y, number = 0, 0
    for title, panels in ROWS.items():
        number += 1
        yield {"id": number, "type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}, "panels": []}
        y += 1
        for i, panel in enumerate(panels):
            number += 1
            place = {"x": i % _COLUMNS * _WIDTH, "y": y + i // _COLUMNS * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            yield {"id": number, "gridPos": place, **_panel(panel)}
        y += -(-len(panels) // _COLUMNS) * _HEIGHT


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 10, "showPoints": "never"}}
    if panel.alert is not None:
        steps = [{"color": "green", "value": None}, {"color": "red", "value": panel.alert}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        defaults["custom"] |= {"thresholdsStyle": {"mode": "dashed"}}
    return {
        "type": "timeseries",
        "title": panel.title,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": "ABCD"[i], "expr": query, "legendFormat": legend}
            for i, (query, legend) in enumerate(panel.queries)
        ],
    }
