"""The inventory of metrics, read from what each kind of process registers, and its reference page."""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cairn.cluster.metrics import ClusterMetrics
from cairn.config.schema import Index, Serve
from cairn.observe.figures import TIER_FIGURES
from cairn.observe.metrics import Metrics
from cairn.observe.prometheus import families, tier_family
from cairn.serve.gateway.members import Members
from cairn.serve.gateway.metrics import GatewayMetrics
from cairn.serve.indexer.parts import Parts

#: What every metric of an engine has beside its own labels, under vLLM and at a node.
VLLM_LABELS: Final = ("model_name", "engine")
POOL_LABEL: Final = "pool"


class Described(NamedTuple):
    """A metric. name: as queries have it, of a histogram without its suffix. kind: counter, gauge or histogram."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which its samples come."""
        if self.kind != "histogram":
            return (self.name,)
        return tuple(f"{self.name}_{suffix}" for suffix in ("bucket", "sum", "count"))


def inventory() -> dict[str, list[Described]]:
    """Every metric that each kind of process can show, by the kind's name."""
    engine = [_described(family) for family in families(Metrics())]
    tiers = [_described(tier_family(name)) for name in TIER_FIGURES]
    parts = Parts(Index(blocks=1, worker_blocks=1, sources=1))  # small, and never started
    try:
        gateway = GatewayMetrics(Members(Serve()), (ClusterMetrics(), *parts.metrics.collectors))
        return {
            "engine": engine + tiers,
            "node": [one._replace(labels=(*one.labels, POOL_LABEL)) for one in engine + tiers],
            "index": list(_registered(parts.metrics.registry)),
            "serve": list(_registered(gateway.registry)),
        }
    finally:
        parts.close()


def _registered(registry: CollectorRegistry) -> Iterator[Described]:
    for collector in list(registry._collector_to_names):
        yield from _of_collector(collector)


def _of_collector(collector: Collector) -> Iterator[Described]:
    """One of prometheus_client's own has its labels beside it, ours within each family."""
    own: Iterable[str] | None = getattr(collector, "_labelnames", None)
    for family in collector.collect():
        yield _described(family, own)


def _described(family: Metric, labels: Iterable[str] | None = None) -> Described:
    name = f"{family.name}_total" if family.type == "counter" else family.name
    given = getattr(family, "_labelnames", ()) if labels is None else labels
    return Described(name, family.type, tuple(given), family.documentation)


_HEAD: Final = """\
# Metrics

Made from the processes' own registries by `make docs`; do not edit. What to look at, and when:
[observability.md](observability.md).

Every process shows its metrics at `/metrics`, in Prometheus' text format: `cairn serve` and `cairn index` at their HTTP
ports, engines and `cairn node` at `observe.http_port`, vLLM at its own page, where Cairn's metrics have the labels
`model_name` and `engine` beside their own. A counter that has counted nothing under a label's value shows no sample.
"""
_TITLES: Final = {
    "engine": ("Engines", "An engine (`CacheEngine`, the Transformers connector) or vLLM with Cairn's connector."),
    "node": ("Node", "As an engine's, each with the label `pool`: the geometry of its blocks; empty: the node itself."),
    "index": ("Index", "`cairn index`."),
    "serve": ("Service", "`cairn serve`."),
}


def render() -> str:
    """The page in Markdown; the same text for the same registries."""
    every = inventory()
    shown = {one.name for one in every["engine"]}
    parts = [_HEAD]
    for process, (title, text) in _TITLES.items():
        parts.append(f"\n## {title}\n\n{text}\n")
        if process == "node":
            continue
        told = [one for one in every[process] if process == "engine" or one.name not in shown]
        also = [one for one in told if process == "serve" and one in every["index"]]
        if also:
            parts.append("\nAlso the index's `cairn_fleet_*` and `cairn_index_*` that tell of events and blocks.\n")
        parts.append("\n| metric | kind | labels | meaning |\n| --- | --- | --- | --- |\n")
        parts += [_row(one) for one in sorted(told) if one not in also]
    return "".join(parts)


def _row(one: Described) -> str:
    labels = ", ".join(f"`{label}`" for label in one.labels)
    return f"| `{one.name}` | {one.kind} | {labels} | {one.help} |\n"
