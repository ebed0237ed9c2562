"""The whole stack on loopback, all processes real: etcd, services, a node, two engines; and what becomes of requests
while these die. Then the same engines as prefill and decode instances.
"""

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("zmq")
pytest.importorskip("grpc")

import grpc

from cairn.serve.proto.indexer_pb2 import GetPodScoresRequest
from cairn.serve.proto.indexer_pb2_grpc import IndexerServiceStub
from tests.cluster.etcd import etcd, needs_etcd
from tests.serve.gateway.running import Gateway, Process, events
from tests.serve.running import RUN, until
from tests.vllm.chats import ANSWER_S, IN_FLIGHT, TOKENS, Chats
from tests.vllm.stack import BLOCK, START_S, TIMEOUT_S, Engine, engines, ids
from tests.vllm.test_node import Node

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def stack(tiny_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, list[Engine]]]:
    with engines(tiny_texts, tmp_path_factory.mktemp("stack")) as made:
        yield made


def prompt(name: str, tokens: int) -> list[int]:
    chance = random.Random(name)
    return [chance.randrange(1000, 40000) for _ in range(tokens)]


def asked(tokens: list[int], **more: Any) -> dict[str, Any]:
    body = {"model": "smol", "prompt": tokens, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    return body | {"return_token_ids": True} | more


def register(engine: Engine, endpoints: tuple[str, ...]) -> Process:
    """`cairn register`."""
    told = ["--name", engine.name, "--http", engine.url, "--events", engine.events, "--replay", engine.replay]
    command = [sys.executable, "-c", RUN, "register", *told, "--etcd-addr", ",".join(endpoints)]
    return Process([*command, "--set", "cluster.lease_s=60"], f"{engine.name}: registered as ")


def all_told(engine: Engine, gateways: list[Gateway]) -> None:
    """The services know what the engine has computed: events come in order, and these are the last."""
    text = " ".join(random.choices("0123456789", k=2 * BLOCK))
    engine.server.complete(text, 1)
    request = GetPodScoresRequest(prompt=text, model_name="smol", pod_identifiers=[engine.name])

    def knows(gateway: Gateway) -> bool:
        with grpc.insecure_channel(gateway.rpc) as channel:
            scores = IndexerServiceStub(channel).GetPodScores(request, timeout=30).scores
        return any(one.score >= BLOCK for one in scores)

    for gateway in gateways:
        until(lambda: knows(gateway), "the last events")  # noqa: B023 - called here and now


def own_hits(*engines: Engine) -> float:
    """Tokens that engines have found in their own paged caches."""
    return sum(engine.server.metric("vllm:prefix_cache_hits_total") for engine in engines)


@needs_etcd
def test_what_one_has_computed_is_hit_whoever_dies(stack: tuple[Node, list[Engine]], tiny_texts: Path) -> None:
    _, (a, b) = stack
    with ExitStack() as running:
        cluster = running.enter_context(etcd(3))
        for engine in (a, b):
            running.enter_context(register(engine, cluster.endpoints))
        options = ["--etcd-addr", ",".join(cluster.endpoints), "--set", "serve.policy=prefix_aware"]
        options += ["--set", "serve.queue_s=120", "--rpc-server-port", "0", "--tokenizer-path", str(tiny_texts)]
        gateways = [
            running.enter_context(Gateway(*options, CAIRN_SERVE__ADMIN_KEY="boss", CAIRN_SERVE__NAME=name))
            for name in ("one", "two")
        ]
        for gateway in gateways:
            gateway.wait_for("a", "b")
        at = [gateway.at for gateway in gateways]
        chats, later = Chats("chats", at, 20), Chats("later", at, 10)

        async def scenario() -> None:
            await chats.turns(3)
            for engine in (a, b):
                await asyncio.to_thread(all_told, engine, gateways)
            hits, possible = own_hits(a, b), chats.best.possible
            await chats.turns(1)
            possible = chats.best.possible - possible
            assert own_hits(a, b) - hits >= 0.95 * possible > 0, "chats did not go where they had been"
            assert not chats.broken
            assert chats.moved == 0

            # An engine dies among requests, and comes back.
            load = asyncio.create_task(chats.turns(3))
            await chats.some_answers()
            await asyncio.to_thread(a.server.kill)
            a.server.start()
            await load
            await asyncio.to_thread(a.server.wait, time.monotonic() + START_S)
            for gateway in gateways:
                await asyncio.to_thread(gateway.wait_for, "a", "b")

            # A member of etcd and a service die.
            load = asyncio.gather(chats.turns(1), later.turns(4))
            await later.some_answers()
            await asyncio.to_thread(lambda: cluster.leader().kill())
            await asyncio.to_thread(gateways[0].kill)
            await load
            assert a.computed() > 0, "it came back for nothing"

        asyncio.run(scenario())
        until(lambda: {*gateways[1].admin()} == {"a", "b"}, "all that live, and nobody else")

    answers = chats.answers + later.answers
    assert len(answers) == 200
    possible = chats.best.possible + later.best.possible
    assert chats.best.hit + later.best.hit >= 0.95 * possible > 0
    assert all(len(one.tokens) == TOKENS for one in answers)
    checked = answers[::6] + chats.broken
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        right = list(pool.map(lambda one: b.alone(one.prompt, TOKENS), checked))
    assert all(alone[: len(one.tokens)] == one.tokens for one, alone in zip(checked, right, strict=True))


def test_prefill_here_and_decode_there(stack: tuple[Node, list[Engine]]) -> None:
    node, (prefill, decode) = stack
    backends = prefill.backend("prefill") + decode.backend("decode")
    options = ["--set", "serve.policy=round_robin", "--set", "cluster.lease_s=60"]
    with Gateway(*backends, *options, CAIRN_SERVE__ADMIN_KEY="boss") as gateway:
        gateway.wait_for("a", "b")

        def ask(tokens: list[int]) -> list[int]:
            answer = httpx.post(f"http://{gateway.at}/v1/completions", json=asked(tokens), timeout=ANSWER_S)
            assert answer.status_code == 200, answer.text
            return ids(answer.json())

        def asked_of(name: str) -> bool:
            return bool(gateway.admin().get(name, {"running": 0})["running"])

        # A whole number of blocks, a part of one more, and turns that follow, several at a time.
        base = prompt("base", 10 * BLOCK)
        prompts = [base, base + prompt("more", 77), prompt("other", 700), prompt("short", BLOCK + 1)]
        alone = [decode.alone(one, TOKENS) for one in prompts]
        before = [engine.computed() for engine in (prefill, decode)]
        with ThreadPoolExecutor(len(prompts)) as pool:
            assert list(pool.map(ask, prompts)) == alone
        lengths = [len(one) for one in prompts]
        left = sum(length % BLOCK or 1 for length in lengths)
        until(lambda: decode.computed() - before[1] == left, "the decode engine computes what is no whole block")
        assert sum(lengths) - len(base) <= prefill.computed() - before[0] <= sum(lengths)
        assert gateway.metric("cairn_serve_prefills_total") == len(prompts)
        assert gateway.metric("cairn_serve_failures_total") == 0

        streamed = prompt("streamed", 300)
        expected = decode.alone(streamed, TOKENS)
        before = [engine.computed() for engine in (prefill, decode)]
        with gateway.client.stream("POST", "/v1/completions", json=asked(streamed, stream=True)) as answer:
            found = [token for event in events(answer) if event for token in event["choices"][0]["token_ids"]]
        assert found == expected
        until(lambda: prefill.computed() - before[0] == len(streamed), "the prefill engine computes it")
        until(lambda: decode.computed() - before[1] == len(streamed) % BLOCK, "the decode engine its end")

        # What was promised and does not come is computed, after a while that ends.
        orphan = prompt("orphan", 200)
        expected = decode.alone(orphan, TOKENS)
        params = {"do_remote_decode": True, "do_remote_prefill": False}
        told = httpx.post(
            f"{prefill.url}/v1/completions",
            json=asked(orphan, max_tokens=1, kv_transfer_params=params),
            timeout=ANSWER_S,
        ).json()["kv_transfer_params"]
        assert told["cairn"]["blocks"] == 200 // BLOCK
        node.kill()
        begun = time.monotonic()
        late = httpx.post(f"{decode.url}/v1/completions", json=asked(orphan, kv_transfer_params=told), timeout=ANSWER_S)
        assert ids(late.json()) == expected
        assert time.monotonic() - begun > TIMEOUT_S / 2, "it was not waited for"

        # The prefill engine dies while it has the request.
        lost = prompt("lost", 400)
        expected = decode.alone(lost, TOKENS)
        for number in prefill.server.processes():
            os.kill(number, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            answering = pool.submit(ask, lost)
            until(lambda: answering.done() or asked_of("a"), "the request at the prefill engine")
            prefill.server.kill()
            assert answering.result(ANSWER_S) == expected
        assert ask(lost) == expected, "without a prefill engine"
