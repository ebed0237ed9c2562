"""`vllm serve` under mixed concurrent streams: scheduler and worker in processes of their own."""

import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.server import Server

LOAD_S = 60.0
CLIENTS = 6
#: The model is bound to one core, as vLLM does by itself: to all but those that it leaves to transfers.
CORE = max(os.sched_getaffinity(0))
CONFIG = {
    "kv_connector": "CairnConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "cairn.connect.vllm",
    "kv_connector_extra_config": {"storage.cpu.size": "192MiB", "engine.planner": False},
}


class Serving(Server):
    """With Cairn's connector, DRAM and disk."""

    def __init__(self, model: Path, home: Path) -> None:
        extra = CONFIG["kv_connector_extra_config"] | {
            "storage.disk.path": str(home / "cache"),
            "storage.disk.size": "1GiB",
        }
        options = ["--max-model-len", "2048", "--max-num-batched-tokens", "512", "--block-size", "32"]
        options += ["--num-gpu-blocks-override", "96", "--max-num-seqs", "8"]
        options += ["--kv-transfer-config", json.dumps(CONFIG | {"kv_connector_extra_config": extra})]
        bound = {"VLLM_CPU_OMP_THREADS_BIND": str(CORE)}
        super().__init__(model, home, *options, environ={"VLLM_SERVER_DEV_MODE": "1"} | bound)

    def stream(self, prompt: list[int], tokens: int, cut: bool) -> str:
        """Asks for a streamed completion; cut: hangs up after the first piece. Returns the text."""
        body = {"model": "smol", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body | {"ignore_eos": True}).encode(),
            {"Content-Type": "application/json"},
        )
        text = ""
        with urllib.request.urlopen(request, timeout=60) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if cut:
                        break
        return text

    def figures(self) -> dict[str, float]:
        """What /metrics shows of Cairn and of vLLM's own count of external hits."""
        ours = ('model_name="smol"', 'engine="0"')
        return {
            "hits": self.metric("cairn_hit_tokens_total", 'tier="dram"', *ours),
            "absent": self.metric("cairn_miss_tokens_total", 'reason="absent"', *ours),
            "partial": self.metric("cairn_miss_tokens_total", 'reason="partial_block"', *ours),
            "stored": self.metric("cairn_stored_tokens_total", 'tier="dram"', *ours),
            "loaded bytes": self.metric("cairn_transfer_bytes_total", 'tier="dram"', 'direction="load"', *ours),
            "stored bytes": self.metric("cairn_transfer_bytes_total", 'tier="dram"', 'direction="store"', *ours),
            "vLLM's hits": self.metric("vllm:external_prefix_cache_hits_total"),
            "vLLM's hits from the host": self.metric("vllm:prompt_tokens_cached_by_source_total", 'source="host"'),
            "vLLM's unknown hits": self.metric(
                "vllm:prompt_tokens_cached_by_source_total", 'source="external_unspecified"'
            ),
        }

    def forget(self) -> None:
        """Empties vLLM's own prefix cache, and leaves Cairn's alone."""
        url = f"http://127.0.0.1:{self.port}/reset_prefix_cache"
        with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=30) as reply:
            assert reply.status == 200

    def usage(self) -> tuple[int, int]:
        """(bytes resident, open file descriptors) of all its processes together."""
        pages = descriptors = 0
        for number in self.processes():
            pages += int(Path(f"/proc/{number}/statm").read_text().split()[1])
            descriptors += len(list(Path(f"/proc/{number}/fd").iterdir()))
        return pages * os.sysconf("SC_PAGE_SIZE"), descriptors


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[Serving]:
    server = Serving(model, tmp_path)
    try:
        server.wait(time.monotonic() + 180)
        yield server
    finally:
        server.stop()


class Client(threading.Thread):
    """Asks until its time is up: a few prompts again and again, longer and shorter; hangs up on one in five."""

    def __init__(self, server: Serving, seed: int, until: float) -> None:
        super().__init__()
        self.server, self.until = server, until
        self.chance = random.Random(seed)
        self.asked = 0
        self.errors: list[str] = []
        self.texts: dict[tuple[int, int], set[str]] = {}

    def run(self) -> None:
        while time.monotonic() < self.until:
            document, length = self.chance.randrange(6), self.chance.choice([200, 320, 500])
            source = random.Random(document)
            prompt = [source.randrange(1000, 40000) for _ in range(length)]
            cut = self.chance.random() < 0.2
            try:
                text = self.server.stream(prompt, 12, cut)
            except (urllib.error.URLError, OSError, ValueError) as error:
                self.errors.append(repr(error))
                continue
            self.asked += 1
            if not cut:
                self.texts.setdefault((document, length), set()).add(text)


def test_a_minute_of_mixed_streams(server: Serving) -> None:
    load(server, 10.0)
    memory, descriptors = server.usage()
    clients = load(server, LOAD_S)
    assert [error for client in clients for error in client.errors] == []
    assert sum(client.asked for client in clients) > 20
    texts: dict[tuple[int, int], set[str]] = {}
    for client in clients:
        for prompt, found in client.texts.items():
            texts.setdefault(prompt, set()).update(found)
    assert {prompt: len(found) for prompt, found in texts.items()} == dict.fromkeys(texts, 1)
    assert server.metric("vllm:external_prefix_cache_hits_total") > 0
    after, descriptors_after = server.usage()
    assert after < memory * 1.1
    assert descriptors_after <= descriptors + CLIENTS
    assert server.metric("vllm:num_requests_running") == 0
    metrics_tell_what_was_served(server)
    copies_run_beside_the_model(server)


def copies_run_beside_the_model(server: Serving) -> None:
    (worker,) = server.named("VLLM::Worker")
    threads = [int(task.name) for task in Path(f"/proc/{worker}/task").iterdir()]
    assert os.sched_getaffinity(worker) == {CORE}
    assert any(os.sched_getaffinity(thread) == os.sched_getaffinity(0) for thread in threads)


def metrics_tell_what_was_served(server: Serving) -> None:
    """A new prompt of ten blocks and ten tokens, asked, forgotten by vLLM, and asked again."""
    block, block_bytes = 32, 2 * 30 * 3 * 64 * 4 * 32
    source = random.Random("a prompt nobody has asked for")
    prompt = [source.randrange(1000, 40000) for _ in range(10 * block + 10)]
    before = server.figures()
    server.stream(prompt, 8, cut=False)
    rises(server, before, {"absent": 320, "partial": 10, "stored": 320, "stored bytes": 10 * block_bytes})
    server.forget()
    before = server.figures()
    server.stream(prompt, 8, cut=False)
    hits = {"hits": 320, "partial": 10, "loaded bytes": 10 * block_bytes}
    rises(server, before, hits | {"vLLM's hits": 320, "vLLM's hits from the host": 320})
    assert server.metric("cairn_tier_capacity_blocks", 'tier="dram"') == (192 << 20) // block_bytes
    resident = server.metric("cairn_tier_resident_blocks", 'tier="dram"')
    assert 20 < resident <= server.metric("cairn_tier_capacity_blocks", 'tier="dram"')
    assert server.metric("cairn_tier_pinned_blocks", 'tier="dram"') == 0
    assert server.metric("cairn_transfer_seconds_total", 'tier="dram"', 'direction="load"') > 0
    assert server.metric("cairn_stored_tokens_total", 'tier="disk"') > 0
    assert server.metric("cairn_tier_written_blocks", 'tier="disk"') > 0
    assert server.metric("cairn_failures_total") == 0


def rises(server: Serving, before: dict[str, float], by: dict[str, float]) -> None:
    """These figures rise by these amounts, and no other does."""
    deadline = time.monotonic() + 20
    expected = {name: value + by.get(name, 0) for name, value in before.items()}
    while (figures := server.figures()) != expected:
        assert time.monotonic() < deadline, {name: (figures[name], expected[name]) for name in expected}
        time.sleep(0.2)  # nothing tells when vLLM has taken its figures in but asking


def load(server: Serving, seconds: float) -> list[Client]:
    """Runs the clients and waits until the last answer is in."""
    clients = [Client(server, seed, time.monotonic() + seconds) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(seconds + 90)
        assert not client.is_alive(), "a request hangs"
    return clients
