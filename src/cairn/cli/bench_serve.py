"""`cairn bench serve`: what the gateway adds to a request, and how many it carries, in front of mock engines.

Gateway, engines and load are processes of their own. Latency is measured at concurrency 1, each request through the
gateway beside the same one straight to an engine; requests a second at concurrency 16.
"""

import asyncio
import json
import os
import random
import select
import string
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, NamedTuple

import numpy as np

from cairn.errors import StorageError
from cairn.serve.gateway.http1 import Pool
from cairn.serve.process import loop_factory

_START_S: Final = 180.0
_ANSWER_S: Final = 60.0
_HEADERS: Final = ((b"content-type", b"application/json"),)
#: Requests before anything is measured: connections are made, and code has run.
_WARM: Final = 100
#: Of each prompt so much is the same for all, as a system prompt is.
_SHARED: Final = 0.25
#: In so many turns, so that what else the machine does meets all alike.
_TURNS: Final = 12


class Load(NamedTuple):
    """What is asked. requests: of each target, at each level. prompt_bytes, tokens: of each request and answer."""

    engines: int = 4
    concurrency: int = 16
    requests: int = 4000
    prompt_bytes: int = 4096
    tokens: int = 16


class Target(NamedTuple):
    """Who is asked. pid: whose processor time is counted; None: nobody's."""

    url: str
    pid: int | None = None


def run_serve(load: Load) -> dict[str, Any]:
    """The gateway's figures, beside an engine's own. Raises StorageError where a process does not start."""
    with engines(load.engines) as urls, gateway(urls) as target:
        return {"load": load._asdict(), **measure({"direct": Target(urls[0]), "cairn": target}, load)}


def measure(targets: Mapping[str, Target], load: Load) -> dict[str, Any]:
    """Figures of all targets, the first of which is an engine itself, for whole answers and for streams."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        found = {
            kind: runner.run(_measured(targets, load, stream=kind == "streams"))
            for kind in ("whole answers", "streams")
        }
    return {"load_average": os.getloadavg()[0], **found}


@contextmanager
def engines(count: int) -> Iterator[list[str]]:
    """Mock engines."""
    with ExitStack() as stack:
        command = [sys.executable, "-m", "cairn.serve.mock"]
        yield [stack.enter_context(_process(command, "mock engine: "))[1] for _ in range(count)]


@contextmanager
def gateway(urls: Sequence[str]) -> Iterator[Target]:
    """`cairn serve` in front of these engines."""
    main = "from cairn.cli import main; main()"
    backends = [part for i, url in enumerate(urls) for part in ("--backend", f"e{i}={url}")]
    command = [sys.executable, "-c", main, "serve", "--http-server-port", "0", *backends]
    with _process(command, "cairn serve: HTTP on ") as (pid, said):
        yield Target(said, pid)


@contextmanager
def _process(command: Sequence[str], says: str) -> Iterator[tuple[int, str]]:
    """A child, and what it says behind `says` once it listens."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        line = child.stdout.readline() if select.select([child.stdout], [], [], _START_S)[0] else ""
        if not line.startswith(says):
            raise StorageError(f"{' '.join(command[:4])}: has not started; run it by itself to see why")
        yield child.pid, line.removeprefix(says).strip()
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


async def _measured(targets: Mapping[str, Target], load: Load, *, stream: bool) -> dict[str, Any]:
    bodies = _bodies(load, stream)
    pools = {name: Pool(target.url, 5.0) for name, target in targets.items()}
    for pool in pools.values():
        for body in bodies[:_WARM]:
            await _ask(pool, body)
    latencies = await _latencies(pools, bodies)
    rates: dict[str, list[float]] = {name: [] for name in targets}
    cpu = dict.fromkeys(targets, 0.0)
    for _ in range(_TURNS):
        for name, pool in pools.items():
            before = _cpu_s(targets[name].pid)
            rates[name].append(await _rate(pool, bodies, load))
            cpu[name] += _cpu_s(targets[name].pid) - before
    direct = latencies[next(iter(targets))]
    figures = {}
    for name, seconds in latencies.items():
        own = np.percentile(seconds, (50, 99)) * 1e3
        figures[name] = {
            "p50_ms": own[0],
            "p99_ms": own[1],
            "added_p50_ms": own[0] - np.percentile(direct, 50) * 1e3,
            "added_p99_ms": own[1] - np.percentile(direct, 50) * 1e3,
            "requests_per_s": float(np.median(rates[name])),
            "cpu_us_per_request": cpu[name] / (load.requests // _TURNS * _TURNS) * 1e6 if targets[name].pid else None,
        }
    for pool in pools.values():
        pool.close()
    return figures


async def _latencies(pools: Mapping[str, Pool], bodies: Sequence[bytes]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in pools}
    for body in bodies:
        for name, pool in pools.items():
            begun = time.perf_counter()
            await _ask(pool, body)
            found[name].append(time.perf_counter() - begun)
    return found


async def _rate(pool: Pool, bodies: Sequence[bytes], load: Load) -> float:
    """Requests a second, at the load's concurrency."""
    left = iter(range(load.requests // _TURNS))

    async def work() -> None:
        for i in left:
            await _ask(pool, bodies[i % len(bodies)])

    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(load.concurrency)))
    return load.requests // _TURNS / (time.perf_counter() - begun)


async def _ask(pool: Pool, body: bytes) -> None:
    answer = await pool.post(b"/v1/completions", _HEADERS, body, _ANSWER_S)
    while await answer.read(_ANSWER_S):
        pass
    if answer.status != 200:
        raise StorageError(f"a request was answered {answer.status}")


def _bodies(load: Load, stream: bool) -> list[bytes]:
    chance = random.Random(1)
    shared = int(_SHARED * load.prompt_bytes)

    def text(size: int) -> str:
        return "".join(chance.choices(string.ascii_letters + "    ", k=size))

    head, fields = text(shared), {"model": "mock", "max_tokens": load.tokens, "stream": stream, "temperature": 0}
    prompts = [head + text(load.prompt_bytes - shared) for _ in range(min(1000, load.requests))]
    return [json.dumps({**fields, "prompt": prompt}).encode() for prompt in prompts]


def _cpu_s(pid: int | None) -> float:
    """Processor time that a process has taken, its threads' included."""
    if pid is None:
        return 0.0
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:  # noqa: PTH123 - /proc
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
