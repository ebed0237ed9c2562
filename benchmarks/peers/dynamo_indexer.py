"""Cairn's fleet index beside NVIDIA Dynamo's `dynamo.indexer` (Rust), end to end over ZeroMQ, in turns on one machine.

    PYTHONPATH=src .venv/bin/python benchmarks/peers/dynamo_indexer.py --out benchmarks/results/fleet_indexer.json

Dynamo's lives in a venv of its own:

    python3 -m venv /tmp/dynamo-venv && /tmp/dynamo-venv/bin/pip install ai-dynamo-runtime==1.6.1

In every round one process (`kv_publisher.py`) publishes the same messages, as vLLM does, on a port a worker: to
`python -m dynamo.indexer`, and to a process that follows them as `cairn index` does, into a `FleetIndex`; who begins
changes from round to round. The clock runs from the first message until the last block of every worker is found, which
is looked for every 5 ms; `blocks_per_cpu_s` counts the subscriber's own processor time instead. Then the whole story is
asked for: `indexed_share` is what is found of it, and only that counts. Queries are of 131,072 tokens: Dynamo's over
HTTP (it has no other way; the time to make the request is left out), Cairn's in process.
"""

import argparse
import http.client
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kv_publisher import write_story

BLOCK_TOKENS = 16
#: workers, prompts, blocks of each, blocks an event, events a message.
CASES = {
    "512_an_event": (16, 12, 8192, 512, 1),
    "64_an_event": (16, 12, 8192, 64, 1),
    "1_an_event": (16, 4, 2048, 1, 1),
    "1_an_event_64_a_message": (16, 4, 8192, 1, 64),
}
QUERY_TOKENS, QUERIES = 131_072, 50
PORT, HTTP_PORT = 24_100, 24_099
LIMIT_S, LOOK_S = 120.0, 0.005
SENTINEL = 999


def story(case: tuple[int, int, int, int, int]) -> tuple[list[bytes], list[Any]]:
    """The payloads that each worker publishes, and the prompts; the last message is one of a block of its own."""
    from cairn.cli.bench_fleet import prompt_of
    from cairn.cli.bench_fleet_wire import payloads_of

    _, prompts, blocks, event_blocks, events = case
    payloads = [one for seed in range(prompts) for one in payloads_of(seed, blocks, event_blocks, events)]
    return payloads + payloads_of(SENTINEL, 1, 1), [prompt_of(seed, blocks) for seed in range(prompts)]


@contextmanager
def publisher(path: Path, workers: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).with_name("kv_publisher.py")), str(path), str(workers), str(PORT)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        expect(process, "bound")
        yield process
    finally:
        process.kill()
        process.wait(10)


def expect(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    if (line := process.stdout.readline().strip()) != word:
        raise SystemExit(f"{word} expected, not {line!r}")


def start(process: subprocess.Popen[str]) -> float:
    """Makes it publish; when that was."""
    expect(process, "subscribed")
    assert process.stdin is not None
    begun = time.perf_counter()
    process.stdin.write("\n")
    process.stdin.flush()
    return begun


class Dynamo:
    """`dynamo.indexer`, asked over HTTP."""

    def __init__(self, python: str, workers: int, threads: int) -> None:
        streams = ",".join(f"{worker}=tcp://127.0.0.1:{PORT + worker}" for worker in range(workers))
        command = [python, "-m", "dynamo.indexer", "--block-size", str(BLOCK_TOKENS), "--port", str(HTTP_PORT)]
        command += ["--threads", str(threads), "--workers", streams, "--model-name", "m"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._connection = self._connect()

    def _connect(self) -> http.client.HTTPConnection:
        deadline = time.monotonic() + 30
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", HTTP_PORT, timeout=30)
            try:
                connection.connect()
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.05)
            else:
                return connection

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def cpu_seconds(self) -> float:
        return cpu_seconds(self._process.pid)

    def ask(self, body: bytes) -> dict[str, Any]:
        self._connection.request("POST", "/query", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise SystemExit(f"dynamo.indexer answers {answer.status}: {text[:200]!r}")
        found: dict[str, Any] = json.loads(text)
        return found

    def blocks(self, tokens: Any) -> list[int]:
        """Of each worker that has any."""
        scores = self.ask(body_of(tokens))["scores"]
        return [sum(ranks.values()) // BLOCK_TOKENS for ranks in scores.values()]


def body_of(tokens: Any) -> bytes:
    return json.dumps({"model_name": "m", "token_ids": tokens.tolist()}).encode()


def run_dynamo(case: tuple[int, int, int, int, int], path: Path, prompts: list[Any], args: Any) -> dict[str, float]:
    from cairn.cli.bench_fleet import prompt_of

    workers, _, blocks, _, _ = case
    with publisher(path, workers) as published:
        dynamo = Dynamo(str(args.dynamo_venv / "bin" / "python"), workers, args.threads)
        try:
            last = prompt_of(SENTINEL, 1)
            before = dynamo.cpu_seconds()
            begun = start(published)
            while dynamo.blocks(last) != [1] * workers:
                if time.perf_counter() - begun > LIMIT_S:
                    break
                time.sleep(LOOK_S)
            spent, cpu = time.perf_counter() - begun, dynamo.cpu_seconds() - before
            indexed = sum(sum(min(held, blocks) for held in dynamo.blocks(one)) for one in prompts)
            body = body_of(long_prompt(prompts))
            samples = [timed(lambda: dynamo.ask(body)) for _ in range(QUERIES)]
        finally:
            dynamo.close()
    return figures(case, spent, cpu, indexed, samples, "query_131072_tokens_http")


def long_prompt(prompts: list[Any]) -> Any:
    import numpy as np

    return np.resize(np.concatenate(prompts), QUERY_TOKENS)


def timed(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def cpu_seconds(pid: int) -> float:
    """Of a process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def figures(case: Any, spent: float, cpu: float, indexed: int, samples: list[float], query: str) -> dict[str, float]:
    workers, prompts, blocks, event_blocks, _ = case
    told = workers * prompts * blocks
    cuts = statistics.quantiles(samples, n=100)
    return {
        "blocks_per_s": indexed / spent,
        "events_per_s": indexed / event_blocks / spent,
        "blocks_per_cpu_s": indexed / cpu,
        "indexed_share": indexed / told,
        f"{query}_us_p50": 1e6 * cuts[49],
        f"{query}_us_p99": 1e6 * cuts[98],
    }


def run_cairn(case: tuple[int, int, int, int, int], path: Path, _prompts: list[Any], _args: Any) -> dict[str, float]:
    """The publisher's clock begins in this process, the rest is a child's: nothing but the index runs in it."""
    with publisher(path, case[0]) as published:
        command = [sys.executable, __file__, "--child", *map(str, case)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            expect(child, "ready")
            before = cpu_seconds(child.pid)
            begun = start(published)
            expect(child, "found")
            spent, cpu = time.perf_counter() - begun, cpu_seconds(child.pid) - before
            found = json.loads(child.communicate("\n", timeout=LIMIT_S)[0])
        finally:
            child.kill()
            child.wait(10)
    return figures(case, spent, cpu, found["indexed"], found["samples"], "query_131072_tokens")


def cairn_child(case: tuple[int, int, int, int, int]) -> None:
    """Follows as `cairn index` does."""
    from cairn.cli.bench_fleet import prompt_of
    from cairn.config.schema import Index
    from cairn.fleet import FleetIndex, Speculation
    from cairn.fleet.instances import Instance, Limits
    from cairn.fleet.metrics import FleetMetrics
    from cairn.serve.indexer.following import Following
    from cairn.serve.indexer.parts import rehearse
    from cairn.serve.process import SWITCH_S

    sys.setswitchinterval(SWITCH_S)
    rehearse()
    workers, count, blocks, _, _ = case
    index, last = FleetIndex(), prompt_of(SENTINEL, 1)
    prompts = [prompt_of(seed, blocks) for seed in range(count)]
    instances = [Instance(f"w{worker}", f"tcp://127.0.0.1:{PORT + worker}") for worker in range(workers)]

    def held(tokens: Any) -> list[int]:
        reach = index.match(tokens).reach[:, -1] // BLOCK_TOKENS
        return [int(one) for one in reach if one]

    following = Following(index, Speculation(), FleetMetrics(), Limits(), threads=Index().event_threads)
    following.start(instances)
    print("ready", flush=True)
    deadline = time.monotonic() + LIMIT_S
    while held(last) != [1] * workers and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    print("found", flush=True)
    sys.stdin.readline()
    indexed = sum(sum(held(one)) for one in prompts)
    long = long_prompt(prompts)
    samples = [timed(lambda: index.match(long)) for _ in range(QUERIES)]
    following.close()
    print(json.dumps({"indexed": indexed, "samples": samples}))


def compare(case: tuple[int, int, int, int, int], args: Any) -> dict[str, Any]:
    contenders = {"cairn": run_cairn, "dynamo": run_dynamo}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    payloads, prompts = story(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "story"
        write_story(path, payloads)
        for turn in range(args.rounds):
            for name in sorted(contenders, reverse=bool(turn % 2)):
                runs[name].append(contenders[name](case, path, prompts, args))
    medians = {
        name: {figure: statistics.median(run[figure] for run in done) for figure in done[0]}
        for name, done in runs.items()
    }
    every = {name: [round(run["blocks_per_s"]) for run in done] for name, done in runs.items()}
    ratios = {
        f"{figure}_ratio": medians["cairn"][figure] / medians["dynamo"][figure]
        for figure in ("blocks_per_s", "blocks_per_cpu_s")
    }
    return {**medians, **ratios, "blocks_per_s_by_round": every, "load_after": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=4, help="dynamo.indexer's; its default")
    parser.add_argument("--dynamo-venv", type=Path, default=Path("/tmp/dynamo-venv"))
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--child", type=int, nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        cairn_child(tuple(args.child))
        return
    from cairn.cli.output import machine

    result: dict[str, Any] = {name: compare(CASES[name], args) for name in args.cases}
    result |= {"version": "ai-dynamo-runtime 1.6.1", "rounds": args.rounds, "threads": args.threads}
    result["machine"] = machine() | {"command": shlex.join(["python", *sys.argv])}
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
