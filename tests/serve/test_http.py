"""The service over HTTP: a real process, real publishers."""

import json
import socket
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.fleet.wire_events import encode, removed, stored
from tests.serve.conftest import Fleet
from tests.serve.running import until

NOTHING = {"vram": 0, "cpu": 0, "disk": 0, "remote": 0}


def tokens_of(test: int, count: int) -> list[int]:
    """Tokens that only this test uses."""
    return list(range(1_000_000 * test, 1_000_000 * test + count))


def names(test: int, blocks: Iterable[int]) -> list[int]:
    return [1000 * test + block for block in blocks]


def test_tokens_by_tier_and_score_whatever_the_body(fleet: Fleet) -> None:
    """40 tokens in VRAM, the first 16 of them on disk too, and 8 more on disk alone."""
    tokens, service = tokens_of(1, 50), fleet.service
    fleet.a.publish(encode([stored(names(1, range(10)), tokens[:40], 4)]))
    fleet.a.publish(encode([stored(names(1, range(4)), tokens[:16], 4, medium="STORAGE")]))
    more = stored(names(1, (10, 11)), tokens[40:48], 4, parent_block_hash=1009, medium="STORAGE")
    fleet.a.publish(encode([more]))
    until(lambda: service.score(token_ids=tokens)["scores"]["a"]["tokens"]["disk"] == 8, "the last event")
    expected = {"rank": 0, "score": 40 + 8 * 0.4, "tokens": NOTHING | {"vram": 40, "disk": 8}}
    answer = service.score(token_ids=tokens, instances=["a"])
    assert answer == {"prompt_tokens": 50, "scores": {"a": expected}, "unknown": []}
    assert service.binary(tokens, instances=["a"]) == answer
    for packed in (np.array(tokens, "<u4").tobytes(), tokens):
        body = msgspec.msgpack.encode({"token_ids": packed, "instances": ["a"]})
        sent = service.client.post("/score", content=body, headers={"content-type": "application/msgpack"})
        assert sent.json() == answer
    assert service.score(token_ids=tokens[:38], instances=["a"])["scores"]["a"]["tokens"]["vram"] == 36
    assert service.client.post("/score?x=1", json={"token_ids": tokens, "instances": ["a"]}).json() == answer
    everybody = service.client.post(
        "/score/tokens", content=np.array(tokens, "<u4").tobytes(), headers={"content-type": "application/octet-stream"}
    )
    assert everybody.json() == service.score(token_ids=tokens)
    weighed = service.score(token_ids=tokens, instances=["a"], weights={"vram": 2, "disk": 0.5})
    assert weighed["scores"]["a"]["score"] == 84.0
    fleet.a.publish(encode([removed(names(1, [0]))]))
    until(lambda: service.score(token_ids=tokens)["scores"]["a"]["tokens"]["vram"] == 0, "the removal")
    # What stands in VRAM behind the removed block is reached by way of the disk: four blocks, then six in VRAM.
    assert service.score(token_ids=tokens)["scores"]["a"]["tokens"] == NOTHING | {"disk": 48}


def test_who_is_asked_for(fleet: Fleet) -> None:
    tokens, service = tokens_of(2, 8), fleet.service
    assert service.score(token_ids=tokens)["scores"].keys() == {"a", "b", "o"}
    assert service.score(token_ids=tokens, model="tiny")["scores"].keys() == {"a", "b"}
    assert service.score(token_ids=tokens, model="other")["scores"].keys() == {"a", "b", "o"}
    asked = service.score(token_ids=tokens, instances=["a", "z", "o"], model="tiny")
    assert (asked["scores"].keys(), asked["unknown"]) == ({"a"}, ["o", "z"])
    assert service.binary(tokens, instances=["b", "z"])["unknown"] == ["z"]
    assert service.score(token_ids=[], instances=["a"])["scores"]["a"]["score"] == 0


def test_ranks_are_caches_of_their_own(fleet: Fleet) -> None:
    tokens, service = tokens_of(3, 16), fleet.service
    fleet.b[0].publish(encode([stored(names(3, range(2)), tokens[:8], 4)], rank=0))
    fleet.b[1].publish(encode([stored(names(3, range(3)), tokens[:12], 4)], rank=1))
    until(lambda: "ranks" in service.score(token_ids=tokens)["scores"]["b"], "two ranks")
    until(lambda: service.score(token_ids=tokens)["scores"]["b"]["score"] == 12, "rank 1")
    until(lambda: service.score(token_ids=tokens)["scores"]["b"]["ranks"]["0"]["score"] == 8, "rank 0")
    found = service.score(token_ids=tokens)["scores"]["b"]
    assert found["rank"] == 1
    assert found["ranks"]["1"] == {"score": 12.0, "tokens": NOTHING | {"vram": 12}}


def test_adapters_and_salts_are_apart(fleet: Fleet) -> None:
    tokens, service = tokens_of(4, 8), fleet.service
    fleet.a.publish(encode([stored(names(4, (0, 1)), tokens, 4, lora_name="sql", lora_id=3)]))
    fleet.a.publish(encode([stored(names(4, (2, 3)), tokens[:8], 4, extra_keys=[["secret"], None])]))
    for fields in ({"lora": "sql"}, {"cache_salt": "secret"}):
        until(lambda fields=fields: service.score(token_ids=tokens, **fields)["scores"]["a"]["score"] == 8, str(fields))
    for fields in ({}, {"lora": "law"}, {"cache_salt": "other"}, {"lora": "sql", "cache_salt": "secret"}):
        assert service.score(token_ids=tokens, **fields)["scores"]["a"]["score"] == 0
    assert service.binary(tokens, lora="sql")["scores"]["a"]["score"] == 8


def test_text_and_chats_are_scored_as_their_tokens(fleet: Fleet) -> None:
    """The tokenizer is one of bytes, so that their tokens are told by hand."""
    from tests.demo.tiny import tiny_tokenizer

    service, tokenizer = fleet.service, tiny_tokenizer()
    text, rendered = "a prompt as text", "<system>be brief<user>hello there<answer>"
    for test, told in ((5, text), (6, rendered)):
        tokens = tokenizer(told)["input_ids"]
        blocks = range(len(tokens) // 4)
        fleet.a.publish(encode([stored(names(test, blocks), tokens[: 4 * len(blocks)], 4)]))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}]
    until(lambda: service.chat(messages=messages)["scores"]["a"]["score"] > 0, "the chat's blocks")
    for answer, told in ((service.score(prompt=text), text), (service.chat(messages=messages), rendered)):
        assert answer["prompt_tokens"] == len(told)
        assert answer["scores"]["a"]["score"] == len(told) // 4 * 4
        assert answer == service.score(token_ids=tokenizer(told)["input_ids"])
    # What OpenAI's clients send besides does not matter; what the template does not write is not there.
    sent = service.chat(messages=messages, model="tiny", temperature=0.3, stream=True, max_tokens=5)
    assert sent["scores"]["a"]["score"] == 40
    part = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    split = service.chat(messages=[messages[0], {"role": "user", "content": part}])
    assert split["prompt_tokens"] == len(rendered) + 1  # a template that wants text gets parts in lines


def test_a_decision_counts_until_its_time_is_up(fleet: Fleet) -> None:
    tokens, service = tokens_of(7, 64), fleet.service
    fleet.a.publish(encode([stored(names(7, [0]), tokens[:4], 4)]))
    until(lambda: service.score(token_ids=tokens)["scores"]["a"]["score"] == 4, "a block")
    assert service.routed(token_ids=tokens, instance="o") == {"prompt_tokens": 64, "seconds": 1.5}
    assert service.score(token_ids=tokens)["scores"]["o"]["tokens"]["vram"] == 64
    assert service.score(token_ids=tokens, cache_salt="x")["scores"]["o"]["score"] == 0
    until(lambda: service.score(token_ids=tokens)["scores"]["o"]["score"] == 0, "the end of the decision")
    sent = service.client.post(
        "/routed/tokens",
        params={"instance": "b", "rank": 1},
        content=np.array(tokens, "<u4").tobytes(),
        headers={"content-type": "application/octet-stream"},
    )
    assert sent.json()["prompt_tokens"] == 64
    found = service.score(token_ids=tokens)["scores"]["b"]
    assert (found["rank"], found["ranks"]["0"]["score"], found["ranks"]["1"]["score"]) == (1, 0, 64)


@pytest.mark.parametrize("kind", ["binary", "json"])
def test_long_prompts(fleet: Fleet, kind: str) -> None:
    test = 8 if kind == "binary" else 9
    tokens, service = tokens_of(test, 131_072), fleet.service
    for first in range(0, 8192, 1024):
        parent = names(test * 100, [first - 1])[0] if first else None
        part = tokens[16 * first : 16 * (first + 1024)]
        blocks = names(test * 100, range(first, first + 1024))
        fleet.a.publish(encode([stored(blocks, part, 16, parent_block_hash=parent)]))
    ask = (lambda: service.binary(tokens)) if kind == "binary" else (lambda: service.score(token_ids=tokens))
    until(lambda: ask()["scores"]["a"]["score"] == 131_072, "all blocks")
    assert ask()["prompt_tokens"] == 131_072


BAD: list[tuple[str, dict[str, Any], int, str]] = [
    ("/score", {}, 400, "exactly one of prompt and token_ids"),
    ("/score", {"prompt": "x", "token_ids": [1]}, 400, "exactly one of prompt and token_ids"),
    ("/score", {"token_ids": [1, -1]}, 400, "token_ids: must be a list of integers"),
    ("/score", {"token_ids": [1 << 32]}, 400, "token_ids: must be a list of integers"),
    ("/score", {"token_ids": "abc"}, 400, "token_ids: must be a list of integers"),
    ("/score", {"token_ids": [1], "instance": "a"}, 400, "instance: Extra inputs are not permitted"),
    ("/score", {"token_ids": [1], "instances": "a"}, 400, "instances: must be a valid list"),
    ("/score", {"token_ids": [1], "weights": {"gpu": 1}}, 400, "weights.gpu: Extra inputs"),
    ("/score", {"token_ids": [1], "weights": {"cpu": -1}}, 400, "weights.cpu: must be greater than"),
    ("/score", {"prompt": "x", "model": "unheard-of"}, 404, "model 'unheard-of': has no tokenizer here"),
    ("/score", {"prompt": "ü" * 50_001}, 413, "prompt: 100002 bytes; at most 100000"),
    ("/score_chat_completions", {}, 400, "messages: Field required"),
    ("/score_chat_completions", {"messages": []}, 400, "messages: List should have at least 1"),
    ("/score_chat_completions", {"messages": ["hi"]}, 400, "messages.0: must be a valid dictionary"),
    ("/score_chat_completions", {"messages": [{"content": "hi"}]}, 400, "messages[0].role: must be text"),
    ("/score_chat_completions", {"messages": [{"role": "user", "content": "x"}] * 101}, 413, "messages: 101; at most"),
    (
        "/score_chat_completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0]: parts of type image_url cannot be tokenized here",
    ),
    (
        "/score_chat_completions",
        {"messages": [{"role": "user", "content": "hi"}], "chat_template": "{{ 1 }}"},
        403,
        "chat_template: none is taken from requests",
    ),
    (
        "/score_chat_completions",
        {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        400,
        "chat_template_kwargs: must not have chat_template",
    ),
    (
        "/score_chat_completions",
        {"messages": [{"role": "user", "content": "hi"}], "continue_final_message": True},
        400,
        "must not both be true",
    ),
    ("/routed", {"token_ids": [1]}, 400, "instance: Field required"),
    ("/routed", {"token_ids": [1], "instance": "z"}, 404, "instance 'z': not followed"),
    ("/routed", {"token_ids": [1], "instance": "b", "rank": 7}, 404, "instance 'b, rank 7': not followed"),
]


@pytest.mark.parametrize(("path", "fields", "status", "words"), BAD, ids=lambda value: str(value)[:30])
def test_what_is_refused_in_a_line(fleet: Fleet, path: str, fields: dict[str, Any], status: int, words: str) -> None:
    answer = fleet.service.client.post(path, json=fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status)
    assert words in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("kind", "body", "status", "words"),
    [
        ("application/json", b"[1, 2]", 400, "the body must be an object"),
        ("application/json", b'{"token_ids": [1, 2}', 400, "token_ids: must be a list of integers"),
        ("application/json", b'{"prompt": "\xff"}', 400, "the body is no object in application/json"),
        ("application/json", b'{"a": ' * 5000, 400, "the body is"),
        ("application/json", b"", 400, "the body is no object"),
        ("application/msgpack", b"\xc1", 400, "the body is no object in application/msgpack"),
        ("application/msgpack", b"\x81\xa9token_ids\xdd\xff\xff\xff\xff", 400, "the body is no object"),
        ("application/msgpack", b"\x81\xa9token_ids\x91\xff", 400, "token_ids: must be binary data, or a list"),
        ("application/msgpack", b"\x81\xa9token_ids\xc4\x03abc", 400, "3 bytes of token ids: must be uint32"),
        (
            "application/octet-stream",
            bytes(8),
            415,
            "content-type 'application/octet-stream': must be application/json or",
        ),
        ("text/plain", b"{}", 415, "content-type 'text/plain': must be application/json or"),
    ],
)
def test_bodies_that_are_none(fleet: Fleet, kind: str, body: bytes, status: int, words: str) -> None:
    answer = fleet.service.client.post("/score", content=body, headers={"content-type": kind})
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_other_refusals(fleet: Fleet) -> None:
    client = fleet.service.client
    assert client.get("/score").json()["error"]["message"] == "GET /score: Method Not Allowed"
    assert client.get("/nothing").json()["error"] == {
        "message": "GET /nothing: Not Found",
        "type": "not_found",
        "code": 404,
    }
    bare = {"content-type": "application/octet-stream"}
    for path, body, words in (
        ("/score/tokens", b"abcde", "5 bytes of token ids: must be uint32"),
        ("/score/tokens?cache_salt=s", b"", "query.cache_salt: Extra inputs are not permitted"),
        ("/routed/tokens", b"", "query.instance: Field required"),
        ("/routed/tokens?instance=a&rank=x", b"", "query.rank: must be a valid integer"),
    ):
        answer = client.post(path, content=body, headers=bare)
        assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True), answer.text


def raw_request(address: str, head: str, *parts: bytes) -> bytes:
    """The answer to a request of which no more than `parts` is sent."""
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.format(host=address).replace("\n", "\r\n").encode())
        for part in parts:
            connection.sendall(part)
        found = b""
        while part := connection.recv(1 << 16):
            found += part
        return found


def test_bodies_too_large_are_refused_before_they_come(fleet: Fleet) -> None:
    """Announced: at once. Not announced: as soon as more has come than is taken, though the end never does."""
    head = "POST /score/tokens HTTP/1.1\nHost: {host}\nContent-Type: application/octet-stream\n"
    told = raw_request(fleet.service.http, head + "Content-Length: 1000000000000\n\n")
    assert told.startswith(b"HTTP/1.1 413 ")
    assert b"at most 2097152 bytes are taken" in told
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    grown = raw_request(fleet.service.http, head + "Transfer-Encoding: chunked\n\n", chunk, chunk, b"1\r\n1\r\n")
    assert grown.startswith(b"HTTP/1.1 413 ")
    assert fleet.service.score(token_ids=[1])["prompt_tokens"] == 1


def test_state_and_health(fleet: Fleet) -> None:
    service = fleet.service
    fleet.other.publish(encode([stored([1], tokens_of(10, 4), 4)]))
    until(lambda: service.state("o")["blocks"] == 1, "a block")
    state = service.state("o")
    assert {**state, "age_s": 0, "endpoint": "", "replay": ""} == {
        "name": "o",
        "rank": 0,
        "model": "other",
        "endpoint": "",
        "replay": "",
        "connected": True,
        "sequence": 1,
        "blocks": 1,
        "age_s": 0,
    }
    assert 0 <= state["age_s"] < 60
    health = service.client.get("/health/ready")
    assert (health.status_code, health.json()["instances"], health.json()["connected"]) == (200, 4, 4)


def test_metrics(fleet: Fleet) -> None:
    service = fleet.service
    service.score(token_ids=[1, 2])
    service.client.post("/score", json={})
    text = service.client.get("/metrics").text
    found = {line.partition("{")[0].partition(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    assert found >= {
        "cairn_fleet_batches_total",
        "cairn_fleet_skipped_events_total" if "fleet_skipped_events_total{" in text else "cairn_fleet_events_total",
        "cairn_fleet_connects_total",
        "cairn_index_blocks",
        "cairn_index_worker_blocks",
        "cairn_index_sources",
        "cairn_index_bytes",
        "cairn_index_connected",
        "cairn_index_orphans_blocks_total",
        "cairn_index_query_tokens_total",
        "cairn_index_request_seconds_bucket",
        "cairn_index_requests_total",
    }
    assert 'cairn_index_requests_total{request="score",status="200"}' in text
    assert 'cairn_index_requests_total{request="score",status="400"}' in text
    assert 'cairn_index_connected{instance="b",rank="1"} 1.0' in text


def test_openapi_names_every_path(fleet: Fleet) -> None:
    tree = fleet.service.client.get("/openapi.json").json()
    assert set(tree["paths"]) == {
        "/score",
        "/score/tokens",
        "/routed/tokens",
        "/score_chat_completions",
        "/routed",
        "/instances",
        "/health",
        "/health/ready",
        "/metrics",
    }
    kinds = tree["paths"]["/score"]["post"]["requestBody"]["content"]
    assert set(kinds) == {"application/json", "application/msgpack"}
    examples = tree["components"]["schemas"]["ScoreRequest"]["examples"]
    assert fleet.service.score(**examples[0])["prompt_tokens"] == 4
    assert json.dumps(tree).count('"$ref": "#/$defs') == 0
