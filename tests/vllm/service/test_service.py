"""The whole stack on loopback, all processes real: etcd, services, a node, two engines; and what becomes of requests
while these die. Then the same engines as prefill and decode instances.
"""

import asyncio
import os
import random
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("zmq")
pytest.importorskip("grpc")

import grpc

from cairn.cluster import Instance, Keys, Registration
from cairn.cluster.etcd import EtcdRegistry, EtcdSettings
from cairn.serve.proto.indexer_pb2 import GetPodScoresRequest
from cairn.serve.proto.indexer_pb2_grpc import IndexerServiceStub
from tests.cluster.etcd import Cluster, etcd, needs_etcd
from tests.ports import free_ports
from tests.serve.gateway.running import Gateway, Process, events
from tests.serve.running import RUN, until
from tests.vllm.service.chats import ANSWER_S, IN_FLIGHT, TOKENS, Chats
from tests.vllm.service.stack import BLOCK, SIZE, START_S, TIMEOUT_S, Engine, ids
from tests.vllm.test_node import Node

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[3]
#: From a death until everything goes its way again.
RECOVERED_S = 10.0


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


async def share(chats: Chats, *engines: Engine) -> float:
    """Of what the chats' next turn could hit, what the engines that it went to had themselves."""
    hits, possible = own_hits(*engines), chats.best.possible
    await chats.turns(1)
    return (own_hits(*engines) - hits) / (chats.best.possible - possible)


def recovered(what: str, seconds: float) -> None:
    sys.stderr.write(f"{what}: {seconds:.2f} s\n")
    assert seconds <= RECOVERED_S, what


async def engine_dies(chats: Chats, engine: Engine, gateways: list[Gateway]) -> None:
    """Among requests, some of them its own, and comes back."""
    load = asyncio.create_task(chats.turns(3))
    await chats.some_answers()

    def is_asked() -> bool:
        return any(gateway.admin()[engine.name]["running"] for gateway in gateways)

    await asyncio.to_thread(until, is_asked, "a request there")
    died = time.monotonic()
    await asyncio.to_thread(engine.server.kill)
    for gateway in gateways:
        await asyncio.to_thread(gateway.wait_without, engine.name)
    recovered("the dead engine is forgotten", time.monotonic() - died)
    engine.server.start()
    await load
    recovered("what the engine had is answered", chats.late_by(died))
    await asyncio.to_thread(engine.server.wait, time.monotonic() + START_S)
    up = time.monotonic()
    for gateway in gateways:
        await asyncio.to_thread(gateway.wait_for, engine.name)
    recovered("the engine is taken back", time.monotonic() - up)


async def leader_and_service_die(chats: Chats, later: Chats, cluster: Cluster, gateways: list[Gateway]) -> None:
    """At once, among requests. What the registry is told then reaches the service that lives."""
    load = asyncio.gather(chats.turns(1), later.turns(4))
    await later.some_answers()
    leader = await asyncio.to_thread(cluster.leader)
    died = time.monotonic()
    await asyncio.gather(asyncio.to_thread(leader.kill), asyncio.to_thread(gateways[0].kill))
    other = Instance(name="other", incarnation=secrets.token_hex(8), http="http://127.0.0.1:1", model="other")
    async with (
        EtcdRegistry(EtcdSettings(endpoints=cluster.endpoints, timeout_s=30)) as registry,
        Registration(registry, Keys().instance(other.name), other, 60),
    ):
        await asyncio.to_thread(gateways[1].wait_for, other.name)
        recovered("what etcd is told is heard", time.monotonic() - died)
    await load
    recovered("what the service had is answered", max(chats.late_by(died), later.late_by(died)))
    assert chats.moved + later.moved > 0, "nobody was at the service that died"


@needs_etcd
def test_what_one_has_computed_is_hit_whoever_dies(stack: tuple[Node, list[Engine]], model: Path) -> None:
    _, (a, b) = stack
    with ExitStack() as running:
        cluster = running.enter_context(etcd(3))
        for engine in (a, b):
            running.enter_context(register(engine, cluster.endpoints))
        options = ["--etcd-addr", ",".join(cluster.endpoints), "--set", "serve.queue_s=120"]
        options += ["--rpc-server-port", "0", "--tokenizer-path", str(model)]

        def gateway(name: str, policy: str = "prefix_aware") -> Gateway:
            environ = {"CAIRN_SERVE__ADMIN_KEY": "boss", "CAIRN_SERVE__NAME": name, "CAIRN_SERVE__POLICY": policy}
            one = running.enter_context(Gateway(*options, **environ))
            one.wait_for("a", "b")
            return one

        gateways = [gateway("one"), gateway("two")]
        at = [gateway.at for gateway in gateways]
        chats, later = Chats("chats", at, 20), Chats("later", at, 10)

        async def scenario() -> None:
            await chats.turns(3)
            for engine in (a, b):
                await asyncio.to_thread(all_told, engine, gateways)
            best = await share(chats, a, b)
            # Round robin beside it. With an even number of chats each would come back to where it was.
            three = gateway("three", "round_robin")
            robin = Chats("robin", [three.at], 7)
            await robin.turns(2)
            beside = await share(robin, a, b)
            three.kill()
            sys.stderr.write(f"hits, of the best possible: {best:.3f}; round robin {beside:.3f}\n")
            assert beside < best >= 0.95, "chats did not go where they had been"
            assert not chats.broken
            assert chats.moved == 0
            await engine_dies(chats, a, gateways)
            await leader_and_service_die(chats, later, cluster, gateways)
            assert a.computed() > 0, "it came back for nothing"

        asyncio.run(scenario())
        until(lambda: {*gateways[1].admin()} == {"a", "b"}, "all that live, and nobody else")

    answers = chats.answers + later.answers
    assert len(answers) == 200
    possible = chats.best.possible + later.best.possible
    assert chats.best.hit + later.best.hit >= 0.95 * possible > 0
    assert all(len(one.tokens) == TOKENS for one in answers)
    checked = answers[::25] + chats.broken
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        right = list(pool.map(lambda engine, one: engine.alone(one.prompt, TOKENS), cycle((a, b)), checked))
    assert all(alone[: len(one.tokens)] == one.tokens for one, alone in zip(checked, right, strict=True))


class Pair:
    """A prefill and a decode engine behind a service."""

    def __init__(self, prefill: Engine, decode: Engine, gateway: Gateway) -> None:
        self.prefill, self.decode, self.gateway = prefill, decode, gateway

    def ask(self, tokens: list[int]) -> list[int]:
        answer = httpx.post(f"http://{self.gateway.at}/v1/completions", json=asked(tokens), timeout=ANSWER_S)
        assert answer.status_code == 200, answer.text
        return ids(answer.json())

    def prefills(self) -> float:
        return self.gateway.metric("cairn_serve_prefills_total")

    def check(self, prompts: list[list[int]], shared: int = 0) -> None:
        """All are asked at a time. One engine computes the prompts, but for what they share, and the other what is no
        whole block; the tokens are those of one alone.
        """
        alone = [self.decode.alone(one, TOKENS) for one in prompts]
        engines = self.prefill, self.decode
        before, prefills = [(engine.asked(), engine.computed()) for engine in engines], self.prefills()
        with ThreadPoolExecutor(len(prompts)) as pool:
            assert list(pool.map(self.ask, prompts)) == alone
        lengths = [len(one) for one in prompts]
        computed = []
        for engine, (tokens, own) in zip(engines, before, strict=True):
            until(lambda: engine.asked() - tokens == sum(lengths), "an engine's own count")  # noqa: B023 - here and now
            computed.append(engine.computed() - own)
        left = sum(length % BLOCK for length in lengths)
        # Of a prompt of whole blocks the last token is computed again. vLLM counts it as computed if the load was part
        # of a step, and as loaded if the request waited for it outside.
        again = sum(length % BLOCK == 0 for length in lengths)
        assert left <= computed[1] <= left + again, "the decode engine computes what is no whole block"
        assert sum(lengths) - shared <= computed[0] <= sum(lengths)
        assert self.prefills() - prefills == len(prompts)
        assert self.gateway.metric("cairn_serve_engine_failures_total") == 0


@pytest.fixture(scope="module")
def pair(stack: tuple[Node, list[Engine]]) -> Iterator[Pair]:
    prefill, decode = stack[1]
    options = [*prefill.backend("prefill"), *decode.backend("decode"), "--set", "cluster.lease_s=60"]
    with Gateway(*options, "--set", "serve.policy=round_robin", CAIRN_SERVE__ADMIN_KEY="boss") as gateway:
        gateway.wait_for("a", "b")
        yield Pair(prefill, decode, gateway)


def test_prefill_here_and_decode_there(stack: tuple[Node, list[Engine]], pair: Pair) -> None:
    node, _ = stack
    # A whole number of blocks, a part of one more, and turns that follow, several at a time.
    base = prompt("base", 5 * BLOCK)
    pair.check([base, base + prompt("more", 77), prompt("other", 300), prompt("short", BLOCK + 1)], len(base))

    streamed = prompt("streamed", 150)
    expected = pair.decode.alone(streamed, TOKENS)
    before = pair.prefill.computed(), pair.decode.computed()
    with pair.gateway.client.stream("POST", "/v1/completions", json=asked(streamed, stream=True)) as answer:
        found = [token for event in events(answer) if event for token in event["choices"][0]["token_ids"]]
    assert found == expected
    until(lambda: pair.prefill.computed() - before[0] == len(streamed), "the prefill engine computes it")
    until(lambda: pair.decode.computed() - before[1] == len(streamed) % BLOCK, "the decode engine its end")

    # What was promised and does not come is computed, after a while that ends.
    orphan = prompt("orphan", 150)
    expected = pair.decode.alone(orphan, TOKENS)
    params: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
    url = f"{pair.prefill.url}/v1/completions"
    body = asked(orphan, max_tokens=1, kv_transfer_params=params)
    params = httpx.post(url, json=body, timeout=ANSWER_S).json()["kv_transfer_params"]
    assert params["cairn"]["blocks"] == 150 // BLOCK
    node.kill()
    begun = time.monotonic()
    url = f"{pair.decode.url}/v1/completions"
    late = httpx.post(url, json=asked(orphan, kv_transfer_params=params), timeout=ANSWER_S)
    assert ids(late.json()) == expected
    assert time.monotonic() - begun > TIMEOUT_S / 2, "it was not waited for"


def through_a_store(home: Path) -> list[list[str]]:
    """Settings of two nodes that reach the same one."""
    store = ["engine.enable_disagg_pd=true", "storage.remote.lookup_timeout_s=10", "storage.remote.timeout_s=60"]
    return [[*store, f"storage.remote.url=file://{home}/shared"]] * 2


def from_node_to_node(home: Path) -> list[list[str]]:
    """Settings of two nodes that read from each other."""
    known = [f"tcp://127.0.0.1:{port}" for port in free_ports(2)]
    peers = ["engine.enable_disagg_pd=true", "node.peers.secret=known to both of them"]
    peers += ["node.peers.lookup_timeout_s=10", "node.peers.timeout_s=30", f"node.peers.known={','.join(known)}"]
    return [[*peers, f"node.peers.address={address}"] for address in known]


@pytest.fixture(scope="module")
def transfer_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mooncake's, out of the environment of the tests that need no vLLM."""
    home = tmp_path_factory.mktemp("packages")
    for part in (ROOT / ".venv").glob("lib/python3*/site-packages/mooncake*"):
        (home / part.name).symlink_to(part.resolve())
    return home


@pytest.mark.parametrize("between", [through_a_store, from_node_to_node])
def test_prefill_on_one_host_and_decode_on_another(
    stack: tuple[Node, list[Engine]],
    pair: Pair,
    transfer_engine: Path,
    tmp_path: Path,
    between: Callable[[Path], list[list[str]]],
) -> None:
    """Each engine has a node of its own."""
    node, _ = stack
    node.kill()
    home = Path(node.address.removeprefix("ipc://")).parent
    with ExitStack() as nodes:
        for engine, settings in zip((pair.prefill, pair.decode), between(tmp_path), strict=True):
            # An engine that is started waits for a node whose socket is there.
            nodes.callback((home / f"node-{engine.name}.sock").unlink, missing_ok=True)
            stored = engine.stored()
            nodes.callback(Node(home, f"node-{engine.name}", SIZE, *settings, packages=transfer_engine).kill)
            until(lambda: engine.stored() > stored, "its node")  # noqa: B023 - called here and now
        pair.check([prompt(f"{between.__name__} {tokens}", tokens) for tokens in (7 * BLOCK + 5, 77)])


def test_a_prefill_engine_dies_while_it_has_the_request(pair: Pair) -> None:
    lost = prompt("lost", 150)
    expected = pair.decode.alone(lost, TOKENS)
    for number in pair.prefill.server.processes():
        os.kill(number, signal.SIGSTOP)

    def has_it() -> bool:
        return bool(pair.gateway.admin().get("a", {"running": 0})["running"])

    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(pair.ask, lost)
        until(lambda: answering.done() or has_it(), "the request at the prefill engine")
        pair.prefill.server.kill()
        assert answering.result(ANSWER_S) == expected
    assert pair.ask(lost) == expected, "without a prefill engine"
    pair.prefill.server.start()  # for who comes next
