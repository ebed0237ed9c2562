"""Processes that a dashboard shows, each a real one."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from tests.ports import free_ports
from tests.serve.gateway.running import Engine, Gateway, Process


class CachedEngine(Process):
    """A mock engine whose cache is a real one, in DRAM."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, "-m", "cairn.serve.mock", "--port", str(port), "--compute-s", "0.0001"]
        super().__init__(command, "mock engine: ", CAIRN_STORAGE__CPU__SIZE="16MiB")


class Cluster(NamedTuple):
    """A service in front of two engines: `one`, which has a cache, and `two`, which has none."""

    gateway: Gateway
    one: CachedEngine
    two: Engine

    def ask(self, prompt: str) -> None:
        body = {"model": "mock", "prompt": prompt, "max_tokens": 2, "stream": True}
        assert self.gateway.client.post("/v1/completions", json=body).status_code == 200


@contextmanager
def running() -> Iterator[Cluster]:
    """All of it; started at once, as each takes seconds."""
    ports = free_ports(2)
    told = [f"--backend={name}=http://127.0.0.1:{port}" for name, port in zip(("one", "two"), ports, strict=True)]
    told += ["--set", "serve.look_s=0.2", "--set", "serve.show_prompts=true", "--set", "serve.policy=round_robin"]
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        begun = pool.submit(Gateway, *told), pool.submit(CachedEngine, ports[0]), pool.submit(Engine, ports[1])
        for one in begun:
            if one.exception() is None:
                stack.enter_context(one.result())  # it ends, whatever has become of the others
        gateway, cached, plain = begun
        yield Cluster(gateway.result(), cached.result(), plain.result())
