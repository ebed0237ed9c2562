"""Spans of a request, through a real gateway and an engine in processes of their own, as a collector has them."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cairn.observe import trace
from tests.engine.pages import GEOMETRY, make_engine, prompt, retrieved, stored
from tests.observe.collector import Collector
from tests.serve.gateway.running import Engine as MockEngine
from tests.serve.gateway.running import Gateway, Process
from tests.serve.running import Service, until

PROMPT = "Prefill once, reuse anywhere. " * 4


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def engine(collector: Collector) -> Iterator[Process]:
    with Process([sys.executable, "-m", "tests.observe.engine_process"], "engine: ", **traced(collector)) as process:
        yield process


@pytest.fixture(scope="module")
def gateway(collector: Collector, engine: Process) -> Iterator[Gateway]:
    with Gateway("--backend", f"e={engine.said.split()[0]}", **traced(collector)) as gateway:
        until(lambda: gateway.client.get("/health/ready").status_code == 200, "the engine is known")
        yield gateway


def traced(collector: Collector) -> dict[str, str]:
    return {"CAIRN_OBSERVE__OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}


def ask(gateway: Gateway, trace: str, prompt: str = PROMPT) -> httpx.Response:
    parent = {"traceparent": f"00-{trace}-00000000000000aa-01", "tracestate": "a=b"}
    answer = gateway.client.post("/v1/completions", json={"model": "m", "prompt": prompt}, headers=parent)
    assert answer.status_code == 200, answer.text
    return answer


def test_a_request_is_one_trace_from_the_client_to_the_layers(collector: Collector, gateway: Gateway) -> None:
    cold, hit = "c0" * 16, "11" * 16
    assert ask(gateway, cold).json()["choices"][0]["text"] == "0"
    loaded = len(PROMPT) // GEOMETRY.block_tokens * GEOMETRY.block_tokens
    assert ask(gateway, hit).json()["choices"][0]["text"] == str(loaded)

    names = ("cairn.serve", "cairn.score", "cairn.schedule", "cairn.engine", "cairn.load", "cairn.store")
    first, second = collector.wait_for(cold, *names), collector.wait_for(hit, *names)
    for spans in (first, second):
        assert spans["cairn.serve"].parent == "00000000000000aa"
        for below in ("cairn.score", "cairn.schedule", "cairn.engine"):
            assert spans[below].parent == spans["cairn.serve"].span
        for below in ("cairn.load", "cairn.store"):
            assert spans[below].parent == spans["cairn.engine"].span, "the engine's process goes on with the trace"
            assert spans[below].service == "cairn-engine"
        assert spans["cairn.serve"].service == "cairn-serve"
        assert spans["cairn.serve"].attributes["status"] == 200
        assert spans["cairn.engine"].attributes["instance"] == "e"
    assert first["cairn.store"].attributes["stored_tokens"] == loaded
    assert first["cairn.load"].attributes["miss_tokens.absent"] == loaded
    load = second["cairn.load"]
    assert load.attributes["hit_tokens.dram"] == load.attributes["held_tokens"] == loaded
    assert [(name, event["layer"], event["there"]) for name, event in load.events] == [
        ("layer", layer, True) for layer in range(GEOMETRY.layers)
    ]
    assert all(0 <= event["waited_s"] < 60 for _, event in load.events)


def test_what_nobody_samples_is_passed_on_and_not_told(collector: Collector, gateway: Gateway) -> None:
    unsampled, after = "ab" * 16, "cd" * 16
    parent = {"traceparent": f"00-{unsampled}-00000000000000aa-00"}
    body = {"model": "m", "prompt": PROMPT}
    assert gateway.client.post("/v1/completions", json=body, headers=parent).status_code == 200
    ask(gateway, after)
    collector.wait_for(after, "cairn.serve", "cairn.load")
    assert not [span for span in collector.spans if span.trace == unsampled]


def test_a_request_that_fails_ends_its_spans(collector: Collector, gateway: Gateway) -> None:
    trace = "ef" * 16
    headers = {"traceparent": f"00-{trace}-00000000000000aa-01"}
    answer = gateway.client.post("/v1/completions", json={"model": "m"}, headers=headers)  # the engine breaks off
    assert answer.status_code == 502
    spans = collector.wait_for(trace, "cairn.serve", "cairn.engine")
    assert "status" not in spans["cairn.serve"].attributes


def test_a_prefill_elsewhere_is_in_the_trace(collector: Collector, engine: Process) -> None:
    """Its engine's spans are below it, and not below that of the engine that decodes."""
    apart = "dd" * 16
    options = ["--backend", f"p={engine.said.split()[0]},role=prefill", "--set", "serve.policy=round_robin"]
    environ = traced(collector) | {"CAIRN_SERVE__ADMIN_KEY": "boss"}
    with (
        MockEngine(model="m") as decode,
        Gateway(*options, "--backend", f"d={decode.url},role=decode", **environ) as gateway,
    ):
        gateway.wait_for("p", "d")
        ask(gateway, apart, PROMPT + "?")
        spans = collector.wait_for(apart, "cairn.serve", "cairn.engine", "cairn.prefill", "cairn.load")
        told = decode.seen()["requests"][-1]["headers"]["traceparent"]
    assert spans["cairn.prefill"].parent == spans["cairn.engine"].span
    assert spans["cairn.load"].parent == spans["cairn.prefill"].span
    assert told.split("-")[1:3] == [apart, spans["cairn.engine"].span]
    assert [spans[name].attributes["instance"] for name in ("cairn.engine", "cairn.prefill")] == ["d", "p"]


def test_the_index_is_part_of_its_askers_trace(collector: Collector) -> None:
    asking = "1d" * 16
    with Service("--no-rpc", **traced(collector)) as index:
        index.client.headers["traceparent"] = f"00-{asking}-00000000000000aa-01"
        index.score(token_ids=[1, 2, 3])
        span = collector.wait_for(asking, "cairn.score")["cairn.score"]
    assert (span.service, span.parent, span.attributes["request"]) == ("cairn-index", "00000000000000aa", "score")


def test_lookups_and_decisions_are_in_the_trace(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setattr(trace, "_otel", None)
    asking = "10" * 16
    remote = {"storage.remote.url": f"file://{tmp_path}", "observe.otlp_endpoint": collector.endpoint}
    with make_engine(32, **remote) as engine:
        stored(engine, prompt(1, 40))
        with trace.joined({"traceparent": f"00-{asking}-00000000000000aa-01"}):
            assert retrieved(engine, prompt(1, 60)) == 40
        spans = collector.wait_for(asking, "cairn.lookup", "cairn.load", "cairn.decide")
    assert spans["cairn.lookup"].parent == spans["cairn.load"].parent == "00000000000000aa"
    assert spans["cairn.lookup"].attributes["blocks"] == 15
    assert spans["cairn.decide"].attributes["kind"] == "load"


def test_layerwise_stats_of_the_engine(engine: Process, gateway: Gateway) -> None:
    ask(gateway, "aa" * 16, PROMPT + "!")
    found = httpx.get(f"{engine.said.split()[1]}/api/v1/layerwise/stats", timeout=60).json()
    assert [one["layer"] for one in found["layers"]] == list(range(GEOMETRY.layers))
    for one in found["layers"]:
        assert one["loads"] >= 1
        assert one["waits"] >= one["loads"]
        assert one["load_seconds"] > 0
        assert one["wait_seconds"] >= 0
    page = httpx.get(f"{engine.said.split()[1]}/metrics", timeout=60).text
    loaded = re.search(r"^cairn_layerwise_load_latency_seconds_count (\S+)", page, re.MULTILINE)
    assert loaded
    assert float(loaded[1]) == sum(one["loads"] for one in found["layers"])


def test_who_does_not_trace_does_not_import_it() -> None:
    code = (
        "import sys; from tests.engine.pages import make_engine, prompt, stored, retrieved\n"
        "with make_engine(16) as engine: stored(engine, prompt(1, 40)); assert retrieved(engine, prompt(1, 40)) == 40\n"
        "import cairn.serve.gateway.app\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
