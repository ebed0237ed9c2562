"""Two `vllm serve` with Cairn's connector, on one node."""

import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cairn.node.segments import sweep
from tests.ports import free_ports
from tests.vllm.server import Server
from tests.vllm.test_node import Node

BLOCK, BLOCKS, MODEL_LEN = 32, 512, 1024
#: Deadline of what waits inside of the connector.
TIMEOUT_S = 10.0
START_S = 360.0
#: Of a node: all that the tests compute.
SIZE = "storage.cpu.size=1GiB"


class Engine:
    """A server that hands over what it has computed and publishes KV events, at addresses that outlive its death."""

    def __init__(self, name: str, model: Path, home: Path, node: str) -> None:
        home.mkdir()
        self.name = name
        events, replay = free_ports(2)
        self.events, self.replay = f"tcp://127.0.0.1:{events}", f"tcp://127.0.0.1:{replay}"
        publisher = {"enable_kv_cache_events": True, "publisher": "zmq"}
        publisher |= {"endpoint": f"tcp://*:{events}", "replay_endpoint": f"tcp://*:{replay}"}
        settings = {"node.address": node, "engine.planner": False, "enable_disagg_pd": True}
        settings |= {"node.timeout_s": 2, "engine.timeout_s": TIMEOUT_S}
        connector = {"kv_connector": "CairnConnector", "kv_connector_module_path": "cairn.connect.vllm"}
        connector |= {"kv_role": "kv_both", "kv_connector_extra_config": settings}
        options = ["--kv-events-config", json.dumps(publisher), "--kv-transfer-config", json.dumps(connector)]
        options += ["--block-size", str(BLOCK), "--num-gpu-blocks-override", str(BLOCKS)]
        options += ["--max-model-len", str(MODEL_LEN), "--max-num-batched-tokens", "256", "--max-num-seqs", "4"]
        options += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
        options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        self.server = Server(model, home, *options)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def backend(self, role: str = "default") -> list[str]:
        """How `cairn serve` is told of it."""
        told = f"{self.name}={self.url},role={role},events={self.events},replay={self.replay}"
        return ["--backend", told]

    def alone(self, prompt: list[int], tokens: int) -> list[int]:
        """What it answers when it reuses nothing."""
        return ids(self.server.complete(prompt, tokens, cache_salt=os.urandom(8).hex(), return_token_ids=True))

    def asked(self) -> float:
        """Tokens of prompts, wherever it had them from."""
        return self.server.metric("vllm:prompt_tokens_by_source_total")

    def computed(self) -> float:
        """Tokens of prompts that it has computed itself."""
        return self.server.metric("vllm:prompt_tokens_by_source_total", 'source="local_compute"')

    def stored(self) -> float:
        """Tokens that its node has got from it, after one more prompt: a worker maps a new node's arena when needed."""
        self.server.complete(random.choices(range(1000, 40000), k=2 * BLOCK), 1)
        return self.server.metric("cairn_stored_tokens_total")


def ids(answer: Any) -> list[int]:
    return list(answer["choices"][0]["token_ids"])


@contextmanager
def engines(model: Path, home: Path) -> Iterator[tuple[Node, list[Engine]]]:
    """Both are up. Each looks for its node, `a` or `b`, at an address of its own, and finds the same one there."""
    with ExitStack() as stack:
        stack.callback(sweep)
        node = Node(home, "node", SIZE)
        stack.callback(node.kill)
        made = []
        for name in ("a", "b"):
            address = home / f"node-{name}.sock"
            address.symlink_to("node.sock")
            made.append(Engine(name, model, home / name, f"ipc://{address}"))
            stack.callback(made[-1].server.kill)
        for engine in made:
            engine.server.wait(time.monotonic() + START_S)
        yield node, made
