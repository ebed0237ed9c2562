"""The bench behind `cairn bench fleet`: what the fleet's index costs to feed, to ask and to keep."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cairn.cli.bench_index import _resident_bytes as resident_bytes

BLOCK_TOKENS = 16
QUERY_BLOCKS = 8192
#: Sources x blocks that all of them hold.
SHARED = ((64, 8192), (1000, 1024))
EVENT_BLOCKS = (64, 512)
#: Blocks an event, events a batch.
BATCHES = ((1, 1), (1, 64), (64, 1), (512, 1))
MILLIONS = (1, 50)
SNAPSHOT_MILLIONS = (1, 10)


def run_fleet(millions: tuple[int, ...] = MILLIONS, shared: tuple[tuple[int, int], ...] = SHARED) -> dict[str, Any]:
    """Every part in a process of its own, so that memory is what the process really grew by.

    `wire`: all sources hold the same blocks, from the msgpack that vLLM would publish. `shared`: the same from decoded
    events of 64 and of 512 blocks, one by one, tokens as lists of ints. `distinct`: nobody holds what another does, so
    that every key has to be hashed, also in queries of these prompts in turns. `ragged`: all hold prefixes of one
    prompt, no two alike. `growth`: by millions of worker-blocks, 64 sources, prompts of 8,192 blocks. `busy`: lookups
    while another thread feeds the index as fast as it takes. Queries are of 8,192 blocks and have been hashed before,
    unless they are called `from_tokens`; their answer is all sources' prefixes.
    """
    events = {f"{w}x{b}_by_{per}": _apart("shared", w, b, per) for w, b in shared for per in EVENT_BLOCKS}
    bytes_ = {f"{w}x{b}_by_{per}_{n}_a_batch": _apart("wire", w, b, per, n) for w, b in shared for per, n in BATCHES}
    return {
        "wire": bytes_,
        "shared": events,
        "distinct": _apart("distinct", 16, 8192),
        "ragged": {str(sources): _apart("ragged", sources) for sources in (64, 1000)},
        "growth": {f"{million}M": _apart("growth", million) for million in millions},
        "busy": _apart("busy", 64),
        "http": _apart("http", 16),
        "snapshot": {f"{million}M": _apart("snapshot", million) for million in SNAPSHOT_MILLIONS},
    }


def _apart(part: str, *arguments: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "cairn.cli.bench_fleet", part, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=900)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def prompt_of(seed: int, blocks: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(0, 128_000, blocks * BLOCK_TOKENS).astype(np.uint32)


def events_of(seed: int, blocks: int, event_blocks: int, *, lists: bool = True) -> list[Any]:
    """A prompt as an engine would tell it: 64-bit hashes, each event behind the one before."""
    import numpy as np

    from cairn.fleet import Stored, Tier

    hashes = np.random.default_rng([seed, 1]).integers(0, 1 << 64, blocks, np.uint64).tolist()
    tokens = prompt_of(seed, blocks).reshape(blocks, BLOCK_TOKENS)
    found = []
    for first in range(0, blocks, event_blocks):
        part = tokens[first : first + event_blocks].reshape(-1)
        names = tuple(hashes[first : first + event_blocks])
        parent = hashes[first - 1] if first else None
        found.append(Stored(names, parent, part.tolist() if lists else part, BLOCK_TOKENS, Tier.VRAM, b"", ()))
    return found


def warm() -> None:
    """Compiles."""
    from cairn.fleet import FleetIndex, Source

    index = FleetIndex(64)
    for source in range(3):
        index.apply(Source("a", source), events_of(source, 64, 16))
        index.apply(Source("a", source), events_of(source, 64, 16, lists=False))
    index.drop("a")
    index.match(prompt_of(0, 64))


def feed(index: Any, sources: int, events: list[Any]) -> float:
    """Seconds that it takes to hear the events from so many sources, one event a call."""
    from cairn.fleet import Source

    start = time.perf_counter()
    for source in range(sources):
        for event in events:
            index.apply(Source(f"w{source}", 0), (event,))
    return time.perf_counter() - start


def shared(sources: int, blocks: int, event_blocks: int) -> dict[str, float]:
    """All sources hold the same blocks."""
    from cairn.fleet import FleetIndex

    warm()
    events, tokens = events_of(1, blocks, event_blocks), prompt_of(1, blocks)
    if blocks < QUERY_BLOCKS:
        tokens = joined(tokens, prompt_of(2, QUERY_BLOCKS - blocks))
    before = resident_bytes()
    index = FleetIndex()
    spent = feed(index, sources, events)
    grown = resident_bytes() - before
    hashed, stats = index.hashed(tokens), index.stats()
    return {
        "ingest_blocks_per_s": sources * blocks / spent,
        "bytes_per_worker_block": stats.bytes / stats.worker_blocks,
        "process_bytes_per_worker_block": grown / stats.worker_blocks,
        **percentiles("query", lambda: index.match(hashed)),
        **percentiles("query_from_tokens", lambda: index.match(tokens)),
    }


def distinct(sources: int, blocks: int) -> dict[str, float]:
    """Nobody holds what another does."""
    from cairn.fleet import FleetIndex, Source

    warm()
    index, spent = FleetIndex(), 0.0
    for source in range(sources):
        events = events_of(source, blocks, EVENT_BLOCKS[-1])
        start = time.perf_counter()
        for event in events:
            index.apply(Source(f"w{source}", 0), (event,))
        spent += time.perf_counter() - start
    stats = index.stats()
    hashed = index.hashed(prompt_of(sources // 2, blocks))
    prompts = [prompt_of(source, blocks) for source in range(sources)]
    turns = iter([prompts[i % sources] for i in range(200)])
    new, strange = (iter([prompt_of(seed + i, blocks) for i in range(50)]) for seed in (1000, 2000))
    return {
        "ingest_blocks_per_s": sources * blocks / spent,
        "bytes_per_worker_block": stats.bytes / stats.worker_blocks,
        **percentiles("query", lambda: index.match(hashed)),
        **percentiles("query_from_tokens_in_turns", lambda: index.match(next(turns)), 200),
        **percentiles("query_from_tokens_nobody_holds", lambda: index.match(next(strange)), 50),
        **percentiles("hash_of_new_tokens", lambda: index.hashed(next(new)), 50),
    }


def ragged(sources: int) -> dict[str, float]:
    """All hold prefixes of one prompt, of lengths spread evenly."""
    from cairn.fleet import FleetIndex, Source

    warm()
    index, events = FleetIndex(), events_of(1, QUERY_BLOCKS, 8, lists=False)
    for source in range(sources):
        index.apply(Source(f"w{source}", 0), events[: 1 + source * len(events) // sources])
    hashed = index.hashed(prompt_of(1, QUERY_BLOCKS))
    return {"sets": index.stats().sets, **percentiles("query", lambda: index.match(hashed))}


def growth(million: int) -> dict[str, float]:
    """64 sources that hold the same prompts; figures of the last million worker-blocks, queries of any prompt."""
    from cairn.fleet import FleetIndex, Source

    warm()
    before = resident_bytes()
    index, sources = FleetIndex(), 64
    prompts = max(2, million * 1_000_000 // (sources * QUERY_BLOCKS))
    events = (events_of(seed, QUERY_BLOCKS, EVENT_BLOCKS[-1]) for seed in range(prompts))
    spent = [feed(index, sources, one) for one in events]
    grown, stats = resident_bytes() - before, index.stats()
    hashed = [index.hashed(prompt_of(seed * 37 % prompts, QUERY_BLOCKS)) for seed in range(min(prompts, 64))]
    turns = iter([hashed[i % len(hashed)] for i in range(1000)])
    start = time.perf_counter()
    index.drop(Source("w1", 0))
    return {
        "worker_blocks": stats.worker_blocks,
        "ingest_blocks_per_s": 2 * sources * QUERY_BLOCKS / sum(spent[-2:]),
        "process_bytes_per_worker_block": grown / stats.worker_blocks,
        "drop_ns_per_block": 1e9 * (time.perf_counter() - start) / (stats.worker_blocks / sources),
        **percentiles("query", lambda: index.match(next(turns)), 1000),
    }


def busy(sources: int) -> dict[str, float]:
    """Lookups while another thread feeds prompts that are new to the index, from bytes."""
    from cairn.cli.bench_fleet_wire import hear, payloads_of
    from cairn.fleet import FleetIndex

    warm()
    index, tokens = FleetIndex(), prompt_of(1, QUERY_BLOCKS)
    feed(index, sources, events_of(1, QUERY_BLOCKS, EVENT_BLOCKS[-1]))
    hashed = index.hashed(tokens)
    more = [payloads_of(seed, 1024, 64, 8) for seed in range(2, 34)]
    stop, fed, spent = threading.Event(), [0], [0.0]

    def ingest() -> None:
        for payloads in _forever(more):
            spent[0] += sum(hear(index, sources, payloads).values())
            fed[0] += sources * 1024
            if stop.is_set():
                return

    alone = percentiles("query_alone", lambda: index.match(hashed), 5000)
    thread = threading.Thread(target=ingest)
    thread.start()
    found = percentiles("query", lambda: index.match(hashed), 5000)
    stop.set()
    thread.join()
    return {"ingest_blocks_per_s": fed[0] / spent[0], **found, **alone}


def snapshot(million: int) -> dict[str, float]:
    """Written and read, beside lookups and events."""
    from cairn.cli.bench_fleet_snapshot import run_snapshot

    return run_snapshot(million)


def percentiles(name: str, call: Callable[[], object], times: int = 500) -> dict[str, float]:
    """Microseconds, the median and the 99th percentile."""
    import numpy as np

    samples = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return {f"{name}_us_p{q}": float(1e6 * np.percentile(samples, q)) for q in (50, 99)}


def _forever(parts: list[Any]) -> Iterator[Any]:
    while True:
        yield from parts


def joined(*tokens: Any) -> Any:
    import numpy as np

    return np.concatenate(tokens)


def http(sources: int) -> dict[str, float]:
    """The service beside the same in process; see `run_http`."""
    from cairn.cli.bench_fleet_http import run_http

    return run_http(sources)


def wire(sources: int, blocks: int, event_blocks: int, events: int) -> dict[str, float]:
    """From the bytes that engines publish, see `cairn.cli.bench_fleet_wire`."""
    from cairn.cli.bench_fleet_wire import wire as measured

    return measured(sources, blocks, event_blocks, events)


PARTS: dict[str, Callable[..., dict[str, float]]] = {
    "wire": wire,
    "shared": shared,
    "distinct": distinct,
    "ragged": ragged,
    "growth": growth,
    "busy": busy,
    "http": http,
    "snapshot": snapshot,
}

if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]](*map(int, sys.argv[2:]))))
