"""The engine core of a `vllm serve` with Cairn is killed in the middle of stores: no process stays behind or hangs, and
a new server on the same disk serves the same tokens, from what had been written.
"""

import json
import os
import random
import signal
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.server import Server

BLOCK = 32
START_S = 180.0
#: The worker outlives the core by the step that it is in: on a busy machine that is a prefill of many seconds, with
#: Cairn and without.
END_S = 60.0
CONFIG = {
    "kv_connector": "CairnConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "cairn.connect.vllm",
}


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[Server]:
    disk = {"storage.disk.path": str(tmp_path / "cache"), "storage.disk.size": "1GiB"}
    settings = {"storage.cpu.size": "192MiB", "engine.planner": False} | disk
    options = ["--max-model-len", "1024", "--max-num-batched-tokens", "256", "--block-size", str(BLOCK)]
    options += ["--num-gpu-blocks-override", "96", "--max-num-seqs", "4"]
    options += ["--kv-transfer-config", json.dumps(CONFIG | {"kv_connector_extra_config": settings})]
    server = Server(model, tmp_path, *options)
    try:
        server.wait(time.monotonic() + START_S)
        yield server
    finally:
        server.stop()


def prompt(name: str, tokens: int) -> list[int]:
    chance = random.Random(name)
    return [chance.randrange(1000, 40000) for _ in range(tokens)]


def text(reply: Any) -> str:
    return str(reply["choices"][0]["text"])


class Client(threading.Thread):
    """Asks for one new prompt after the other until the server is gone."""

    def __init__(self, server: Server, name: str) -> None:
        super().__init__()
        self.server, self.prefix = server, name
        self.asked: list[list[int]] = []

    def run(self) -> None:
        for number in range(1000):
            self.asked.append(prompt(f"{self.prefix} {number}", 500))
            try:
                self.server.complete(self.asked[-1], 8)
            except (urllib.error.URLError, OSError, ValueError):
                return


def stored(server: Server, tier: str) -> float:
    return server.metric("cairn_stored_tokens_total", f'tier="{tier}"')


def rises(server: Server, tier: str, to: float) -> None:
    deadline = time.monotonic() + 60
    while stored(server, tier) < to:
        assert time.monotonic() < deadline, (tier, stored(server, tier), to)
        time.sleep(0.1)  # nothing tells when vLLM has taken Cairn's figures in but asking


def test_the_core_is_killed_in_the_middle_of_stores(server: Server) -> None:
    kept = [prompt(f"kept {i}", tokens) for i, tokens in enumerate([200, 320, 333, 500])]
    texts = [text(server.complete(asked, 8)) for asked in kept]
    whole = sum(len(asked) // BLOCK * BLOCK for asked in kept)
    rises(server, "disk", whole)

    clients = [Client(server, f"client {i}") for i in range(3)]
    for client in clients:
        client.start()
    rises(server, "dram", whole + 1000)
    (core,) = server.named("VLLM::EngineCore")
    os.kill(core, signal.SIGKILL)
    assert server.ended(END_S), server.log.read_text()[-3000:]
    for client in clients:
        client.join(10)
        assert not client.is_alive(), "a request hangs"

    server.start()
    server.wait(time.monotonic() + START_S)
    assert [text(server.complete(asked, 8)) for asked in kept] == texts
    found = sum(min(len(asked) // BLOCK * BLOCK, len(asked) - 1) for asked in kept)  # the last token is always computed
    assert server.metric("vllm:external_prefix_cache_hits_total") == found
    # What was being stored is right where it is found: a salt of its own makes vLLM and Cairn compute it all.
    cut = [asked for client in clients for asked in client.asked[-2:]]
    warm = [text(server.complete(asked, 8)) for asked in cut]
    assert warm == [text(server.complete(asked, 8, cache_salt="cold")) for asked in cut]
    assert server.metric("cairn_failures_total") == 0
