"""Engines that die, fail, stall or are not there: what can be asked again is, what was begun is gone on with."""

import json
import time
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.ports import free_ports
from tests.serve.gateway.running import Bench, Engine, Gateway, events, text_of

BOSS = {"authorization": "Bearer boss"}
TOKENS = 40


def body_of(model: str, path: str, **more: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": "Tell me"}
    if path.endswith("chat/completions"):
        asked = {"messages": [{"role": "user", "content": "Tell me"}]}
    return {"model": model, "max_tokens": TOKENS, "temperature": 0, "stream": True} | asked | more


def only(bench: Bench, chosen: Engine, *others: Engine) -> None:
    """Requests go to `chosen`."""
    for engine, what in ((chosen, "undrain"), *((one, "drain") for one in others)):
        bench.gateway.client.post(f"/admin/instances/{bench.name_of(engine)}/{what}", headers=BOSS).raise_for_status()


@pytest.mark.parametrize("after", [1, 17])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_outlives_its_engine(bench: Bench, path: str, after: int) -> None:
    """kill -9 in the midst: the same text, one id, one end, the usage of the whole."""
    model = f"dies-{len(path)}-{after}"
    with ExitStack() as stack:
        dying, other = (stack.enter_context(one) for one in bench.engines(model, {"stall_after": after}, {}))
        body = body_of(model, path, stream_options={"include_usage": True})
        with httpx.stream("POST", f"{other.url}{path}", json=body) as answer:
            whole = list(events(answer))
        only(bench, dying, other)
        found: list[dict[str, Any] | None] = []
        with bench.gateway.client.stream("POST", path, json=body) as answer:
            for event in events(answer):
                found.append(event)
                if sum(map(bool, map(text_of, found))) == after and dying.process.poll() is None:
                    only(bench, other, dying)
                    dying.kill()
        bench.gateway.wait_without(bench.name_of(dying))
    assert "".join(map(text_of, found)) == "".join(map(text_of, whole))
    assert found.count(None) == 1
    assert found[-1] is None
    told = [event for event in found if event]
    assert len({(event["id"], event["created"]) for event in told}) == 1
    assert [event["choices"][0]["finish_reason"] for event in told if event["choices"]].count("length") == 1
    assert told[-1]["usage"]["completion_tokens"] == TOKENS
    assert whole[-2] is not None
    assert told[-1]["usage"]["total_tokens"] == whole[-2]["usage"]["total_tokens"]
    assert sum("role" in event["choices"][0].get("delta", {}) for event in told if event["choices"]) == ("chat" in path)


def test_an_engine_that_says_it_fails_is_left(bench: Bench) -> None:
    """As vLLM does when its core dies in the midst of a stream; at another one it goes on, without one it is said."""
    with ExitStack() as stack:
        failing, other = (stack.enter_context(one) for one in bench.engines("says", {"error_after": 5}, {}))
        with httpx.stream("POST", f"{other.url}/v1/completions", json=body_of("says", "")) as answer:
            whole = "".join(map(text_of, events(answer)))
        for _ in range(2):  # both have their turn
            with bench.gateway.client.stream("POST", "/v1/completions", json=body_of("says", "")) as answer:
                assert "".join(map(text_of, events(answer))) == whole
        assert failing.seen()["requests"]
        only(bench, failing, other)
        with bench.gateway.client.stream("POST", "/v1/completions", json=body_of("says", "", temperature=1)) as answer:
            said = answer.read()
    assert said.count(b'"text"') == 5
    assert b"failed as told" in said


@pytest.mark.parametrize("more", [{"temperature": 0.7}, {"logprobs": 1}, {"prompt": [1, 2, 3]}])
def test_what_cannot_be_gone_on_with_ends_with_an_error(bench: Bench, more: dict[str, Any]) -> None:
    model = f"ends-{next(iter(more))}"
    with ExitStack() as stack:
        dying, other = (stack.enter_context(one) for one in bench.engines(model, {"stall_after": 3}, {}))
        only(bench, dying, other)
        found, broken = [], bench.gateway.metric("cairn_serve_broken_total")
        failures = bench.gateway.metric("cairn_serve_engine_failures_total")
        with bench.gateway.client.stream("POST", "/v1/completions", json=body_of(model, "", **more)) as answer:
            for event in events(answer):
                found.append(event)
                if len(found) == 3:
                    only(bench, other, dying)
                    dying.kill()
        assert bench.gateway.metric("cairn_serve_broken_total") == broken + 1
        assert bench.gateway.metric("cairn_serve_engine_failures_total") == failures + 1
    assert [bool(text_of(event)) for event in found] == [True] * 3 + [False] * 2
    assert found[3] is not None
    assert "the answer ends here" in found[3]["error"]["message"]
    assert found[4] is None


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_has_sent_nothing_is_asked_again(bench: Bench, stream: bool) -> None:
    model = f"again-{stream}"
    with ExitStack() as stack:
        failing, good = (stack.enter_context(one) for one in bench.engines(model, {"fail": 503}, {}))
        before = bench.gateway.metric("cairn_serve_retries_total")
        for _ in range(4):
            answer = bench.gateway.client.post("/v1/completions", json=body_of(model, "", stream=stream))
            assert answer.status_code == 200
            assert "error" not in answer.text
        failing.kill()
        for _ in range(2):
            answer = bench.gateway.client.post("/v1/completions", json=body_of(model, "", stream=stream))
            assert answer.status_code == 200
        assert len(good.seen()["requests"]) == 6
        assert bench.gateway.metric("cairn_serve_retries_total") >= before + 2


def test_a_refusal_of_all_engines_is_the_engine_s_own(bench: Bench) -> None:
    with bench.engines("refuses", {"fail": 500})[0] as engine:
        answer = bench.gateway.client.post("/v1/completions", json=body_of("refuses", ""))
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "failed as told")
        assert len(engine.seen()["requests"]) == 3
    with bench.engines("bad", {"fail": 400})[0] as engine:
        assert bench.gateway.client.post("/v1/completions", json=body_of("bad", "")).status_code == 400
        assert len(engine.seen()["requests"]) == 1


def test_a_restarted_engine_serves_again(bench: Bench) -> None:
    with bench.engines("back", {})[0] as engine:
        bench.gateway.client.post("/v1/completions", json=body_of("back", "")).raise_for_status()
        engine.kill()
        bench.gateway.wait_without(bench.name_of(engine))
        with Engine(engine.port, model="back") as again:
            bench.gateway.wait_for(bench.name_of(again))
            bench.gateway.client.post("/v1/completions", json=body_of("back", "")).raise_for_status()
            assert again.seen()["requests"]


def test_prefill_here_and_decode_there(bench: Bench) -> None:
    """The prefill engine is asked for one token, the decode engine for all; a dead one costs nothing."""
    first, second = free_ports(2)
    backends = ["--backend", f"p=http://127.0.0.1:{first},role=prefill"]
    backends += ["--backend", f"d=http://127.0.0.1:{second},role=decode", "--set", "serve.policy=round_robin"]
    with (
        Engine(first) as prefill,
        Engine(second) as decode,
        Gateway(*backends, CAIRN_SERVE__ADMIN_KEY="boss") as gateway,
    ):
        gateway.wait_for("p", "d")
        body = body_of("mock", "", stream=False, max_completion_tokens=TOKENS, stream_options={"include_usage": True})
        direct = httpx.post(f"{decode.url}/v1/completions", json=body).json()
        there = gateway.client.post("/v1/completions", json=body)
        assert there.json()["choices"] == direct["choices"]
        asked = prefill.seen()["requests"][-1]["body"]
        assert (asked["max_tokens"], asked["max_completion_tokens"], asked["stream"]) == (1, 1, False)
        assert asked["prompt"] == body["prompt"]
        assert asked["kv_transfer_params"]["do_remote_decode"]
        assert decode.seen()["requests"][-1]["body"] == body
        prefill.kill()
        assert gateway.client.post("/v1/completions", json=body).json()["choices"] == direct["choices"]
        assert gateway.metric("cairn_serve_prefills_total") == 1


def test_without_engines_it_says_so_at_once() -> None:
    with Gateway("--backend", f"http://127.0.0.1:{free_ports(1)[0]}") as gateway:
        begun = time.monotonic()
        answer = gateway.client.post("/v1/completions", content=json.dumps(body_of("x", "")))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert time.monotonic() - begun < 10
        assert gateway.client.get("/health/ready").status_code == 503
        assert gateway.end() == 0
