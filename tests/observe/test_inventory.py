"""docs/metrics.md tells of every metric that real processes export, and of none that no process does."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families as families_of

from cairn.cli.metrics_docs import Described, inventory, render
from cairn.engine import CacheEngine
from cairn.fleet.publisher import Publisher
from cairn.observe.figures import TIER_FIGURES
from tests.engine.pages import SLOT, make_engine, prompt, retrieved, stored
from tests.fleet.peers import free_endpoint
from tests.fleet.wire_events import encode
from tests.fleet.wire_events import stored as told
from tests.node.rig import ProcessNode
from tests.ports import free_ports
from tests.serve.gateway.running import Engine, Gateway
from tests.serve.running import Service, until

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"
#: Of stores that no test has here, of VRAM, and of nodes that have peers.
ELSEWHERE = {"connects_total", "abandoned_calls_total", "free_lanes", "segments", "dead_segments_total"}
ELSEWHERE |= {"peers", "resting_peers", "leases", "lent_blocks_total"}

Page = dict[str, Metric]


def scraped(url: str, **headers: str) -> Page:
    answer = httpx.get(url, timeout=60, headers=headers)
    assert answer.status_code == 200, answer.text
    # When a counter was made is no metric of ours.
    return {
        one.name: one
        for one in families_of(answer.text)
        if one.name.startswith("cairn_") and not one.name.endswith("_created")
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Page]]:
    """What each kind of process exports, when it has done something; "client": an engine at a node."""
    home, port = tmp_path_factory.mktemp("pages"), free_ports(1)[0]
    remote: dict[str, Any] = {"storage.remote.url": f"file://{home}/remote", "storage.remote.linger_s": 0.01}
    address = f"ipc://{home}/node"
    node = ProcessNode(address, **{"storage.cpu.size": 64 * SLOT, "observe.http_port": port})
    try:
        with (
            make_engine(32, home / "disk", **remote, **{"observe.http_port": 0}) as engine,
            make_engine(32, **{"observe.http_port": 0, "node.address": address, "node.timeout_s": 2}) as client,
        ):
            for one in (engine, client):
                until(lambda one=one: reused(one) == 40, "a hit")  # type: ignore[misc]  # a node may be late, loaded
            assert engine.flush(30)
            yield {
                "engine": scraped(engine._figures.url + "/metrics"),  # type: ignore[union-attr]
                "client": scraped(client._figures.url + "/metrics"),  # type: ignore[union-attr]
                "node": scraped(f"http://127.0.0.1:{port}/metrics"),
                **served(),
            }
    finally:
        node.kill()


def reused(engine: CacheEngine) -> int:
    stored(engine, prompt(1, 40))
    return retrieved(engine, prompt(1, 40))


def served() -> dict[str, Page]:
    """The services', an engine and a publisher of events before them."""
    events = free_endpoint(), free_endpoint()
    with (
        Publisher(*events) as publisher,
        Service("--instance", f"a={events[0]},replay={events[1]}", "--no-rpc") as index,
        Engine() as mock,
        Gateway("--backend", f"e={mock.url}") as gateway,
    ):
        publisher.publish(encode([told([1], [7] * 16, 16)]))
        index.wait_for_blocks("a", 1)
        index.binary(range(64))
        until(lambda: gateway.client.get("/health/ready").status_code == 200, "the engine is known")
        body = {"model": "mock", "prompt": "a", "stream": True}
        assert gateway.client.post("/v1/completions", json=body).status_code == 200
        return {name: scraped(f"http://{at}/metrics") for name, at in (("index", index.http), ("serve", gateway.at))}


def test_the_page_is_made_from_the_registries() -> None:
    assert (DOCS / "metrics.md").read_text() == render(), "make docs"


@pytest.mark.parametrize("process", ["engine", "client", "node", "index", "serve"])
def test_what_a_process_exports_is_in_the_inventory(pages: Mapping[str, Page], process: str) -> None:
    known = {one.name: one for one in inventory()["engine" if process == "client" else process]}
    for family in pages[process].values():
        one = known[f"{family.name}_total" if family.type == "counter" else family.name]
        assert (one.kind, one.help) == (family.type, family.documentation)
        for sample in family.samples:
            assert sample.name in one.series
            assert sample.labels.keys() - {"le"} == {*one.labels}, sample


@pytest.mark.parametrize("process", ["engine", "node", "index", "serve"])
def test_what_is_in_the_inventory_is_exported(pages: Mapping[str, Page], process: str) -> None:
    """Tiers' figures aside, which are those of the tiers that there are."""
    missing = [one.name for one in inventory()[process] if not _is_tiers(one) and not _exported(one, pages[process])]
    assert missing == []


def test_some_tier_reports_every_figure(pages: Mapping[str, Page]) -> None:
    reported = {name for process in ("engine", "client", "node") for name in pages[process]}
    missing = {name for name in TIER_FIGURES if f"cairn_tier_{name.removesuffix('_total')}" not in reported}
    assert missing <= ELSEWHERE


def test_the_figures_mean_something(pages: Mapping[str, Page]) -> None:
    def value(process: str, name: str, **labels: str) -> float:
        samples = [one for family in pages[process].values() for one in family.samples if one.name == name]
        assert samples, name
        return sum(one.value for one in samples if labels.items() <= one.labels.items())

    assert value("engine", "cairn_engine_info", model="m", geometry="2 layers, 2x1x8 float16") == 1
    assert value("engine", "cairn_hit_tokens_total", tier="dram") >= 40
    assert value("engine", "cairn_stored_tokens_total", tier="disk") == 40
    assert 0 < value("engine", "cairn_tier_filesystem_free_bytes") < value("engine", "cairn_tier_filesystem_bytes")
    assert value("client", "cairn_tier_connected", tier="node") == 1
    assert value("node", "cairn_tier_resident_blocks", tier="dram", pool="2x2x4x1x8-float16") == 10
    assert value("node", "cairn_tier_sessions", tier="node", pool="") == 1
    assert value("index", "cairn_fleet_event_lag_seconds_count", instance="a") == 1
    assert value("serve", "cairn_serve_ttft_seconds_count") == 1
    assert value("serve", "cairn_serve_waiting") == 0


def test_every_metric_moves_in_a_test(pages: Mapping[str, Page]) -> None:
    """In these pages, or where another test names it: as a query has it, or as what is counted behind it."""
    moved = {one.name for page in pages.values() for family in page.values() for one in family.samples if one.value}
    still = {one.name for metrics in inventory().values() for one in metrics if not {*one.series} & moved}
    tests = "\n".join(path.read_text() for path in TESTS.rglob("*.py") if path != Path(__file__))
    assert " ".join(name for name in sorted(still) if not re.search(_named(name), tests)) == ""


def _named(metric: str) -> str:
    bare = re.sub("^cairn_(tier_)?|_total$", "", metric)
    return rf'\b({metric}(_count|_sum)?|{bare}_total|Reason\.{bare.upper()}|metrics\.{bare})\b|"{bare}"'


def _is_tiers(one: Described) -> bool:
    return one.name.startswith("cairn_tier_")


def _exported(one: Described, page: Page) -> bool:
    return one.name.removesuffix("_total") in page
