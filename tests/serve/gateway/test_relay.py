"""What goes through unchanged, what is refused, and what a client's leaving or slowness does."""

import json
import socket
import time
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest

from tests.serve.gateway.running import Bench, Engine, events, text_of
from tests.serve.running import until

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6}


@pytest.fixture(scope="module")
def engine(bench: Bench) -> Any:
    with bench.engines("plain", {})[0] as engine:
        yield engine


def test_an_answer_comes_byte_for_byte(bench: Bench, engine: Engine) -> None:
    body = json.dumps({"model": "plain", "prompt": "one", "max_tokens": 9, "unknown": {"b": 1.0, "a": "\u00e9"}})
    there = bench.gateway.client.post("/v1/completions", content=body)
    direct = httpx.post(f"{engine.url}/v1/completions", content=body)
    assert there.status_code == direct.status_code == 200
    assert there.headers["content-type"] == direct.headers["content-type"]
    said = [one.json() | {"id": "", "created": 0} for one in (there, direct)]
    assert said[0] == said[1]
    assert said[0]["usage"]["completion_tokens"] == 9
    assert [one["body"] for one in engine.seen()["requests"][-2:]] == [json.loads(body)] * 2


def test_a_stream_comes_event_by_event(bench: Bench, engine: Engine) -> None:
    body = {"model": "plain", **CHAT, "stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
    with bench.gateway.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = list(events(answer))
    with httpx.stream("POST", f"{engine.url}/v1/chat/completions", json=body) as answer:
        direct = list(events(answer))
    assert found[-1] is None
    assert [one and one | {"id": "", "created": 0} for one in found] == [
        one and one | {"id": "", "created": 0} for one in direct
    ]


def test_headers_of_one_hop_stay_there(bench: Bench, engine: Engine) -> None:
    sent = {
        "authorization": "Bearer mine",
        "connection": "keep-alive, x-hop",
        "x-hop": "1",
        "te": "trailers",
        "cookie": "a=b",
        "x-request-id": "r1",
    }
    bench.gateway.client.post("/v1/completions", json={"model": "plain", "prompt": "x"}, headers=sent)
    got = engine.seen()["requests"][-1]["headers"]
    assert got["x-request-id"] == "r1"
    assert not {"authorization", "x-hop", "te", "cookie", "connection"} & got.keys()
    assert got["host"] == engine.url.removeprefix("http://")


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "says"),
    [
        ("POST", "/v1/completions", b"{", 400, "no object in JSON"),
        ("POST", "/v1/completions", b"[1]", 400, "no object in JSON"),
        ("POST", "/v1/completions", b'{"a":' * 100_000, 400, "nested too deeply"),
        ("POST", "/v1/completions", b" " * (1 << 21), 413, "at most 1048576 bytes"),
        ("GET", "/v1/completions", b"", 404, "nothing like it"),
        ("GET", "/v2", b"", 404, "nothing like it"),
        ("GET", "/v1/models/none", b"", 404, "no engine serves it"),
        ("GET", "/admin/instances", b"", 401, "a key is needed"),
    ],
)
def test_refusals_are_in_openai_s_form(
    bench: Bench, engine: Engine, method: str, path: str, content: bytes, status: int, says: str
) -> None:
    answer = httpx.request(method, f"http://{bench.gateway.at}{path}", content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
    assert says in answer.json()["error"]["message"]


def test_models_health_and_metrics_are_there(bench: Bench, engine: Engine) -> None:
    client = bench.gateway.client
    until(lambda: "plain" in [one["id"] for one in client.get("/v1/models").json()["data"]], "the model is listed")
    assert client.get("/v1/models/plain").json()["id"] == "plain"
    assert client.get("/health/ready").json()["ready"]
    assert bench.gateway.metric("cairn_serve_requests_total") > 0


def test_a_drained_engine_gets_nothing_new(bench: Bench) -> None:
    with ExitStack() as stack:
        first, second = (stack.enter_context(one) for one in bench.engines("drain", {}, {}))
        path = f"/admin/instances/{bench.name_of(first)}"
        boss = {"authorization": "Bearer boss"}
        assert bench.gateway.client.post(f"{path}/drain", headers=boss).json()["drained"]
        for _ in range(6):
            bench.gateway.client.post("/v1/completions", json={"model": "drain", "prompt": "x"}).raise_for_status()
        assert (len(first.seen()["requests"]), len(second.seen()["requests"])) == (0, 6)
        bench.gateway.client.post(f"{path}/undrain", headers=boss).raise_for_status()
        for _ in range(4):
            bench.gateway.client.post("/v1/completions", json={"model": "drain", "prompt": "x"}).raise_for_status()
        assert first.seen()["requests"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_engine_s_work(bench: Bench, stream: bool) -> None:
    with bench.engines(f"leave-{stream}", {"token_s": 0.05})[0] as engine:
        body = json.dumps({"model": f"leave-{stream}", "prompt": "x", "max_tokens": 100_000, "stream": stream}).encode()
        with socket.create_connection(bench.gateway.at.split(":")) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            until(lambda: engine.seen()["running"] == 1, "it runs")
            if stream:
                assert client.recv(100).startswith(b"HTTP/1.1 200")
        until(lambda: engine.seen()["aborted"] == 1, "it was ended")
        assert engine.seen()["running"] == 0
        until(lambda: bench.gateway.admin()[bench.name_of(engine)]["running"] == 0, "nothing runs")


def test_a_client_that_does_not_read_takes_no_memory(bench: Bench) -> None:
    """Of 400 MB that an engine would stream as fast as it is read."""
    with bench.engines("slow", {"word_bytes": 40_000})[0] as engine:
        body = json.dumps(
            {"model": "slow", "prompt": "x", "max_tokens": 10_000, "stream": True, "temperature": 0}
        ).encode()
        process = psutil.Process(bench.gateway.process.pid)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            client.connect(("127.0.0.1", int(bench.gateway.at.rpartition(":")[2])))
            before = process.memory_info().rss
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            until(lambda: engine.seen()["sent_bytes"] > 0, "it streams")
            sizes = [0, engine.seen()["sent_bytes"]]
            while sizes[-1] != sizes[-2]:  # until the engine itself is held back
                time.sleep(0.2)
                sizes.append(engine.seen()["sent_bytes"])
            assert sizes[-1] < 40 << 20
            assert process.memory_info().rss - before < 64 << 20
        until(lambda: engine.seen()["aborted"] == 1, "it was ended")


def test_text_of_events_is_the_whole_text(bench: Bench, engine: Engine) -> None:
    body = {"model": "plain", "prompt": "two", "max_tokens": 40}
    whole = bench.gateway.client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with bench.gateway.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        assert "".join(map(text_of, events(answer))) == whole
