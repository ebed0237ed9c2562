"""The bench of the fleet index's snapshots: time, size, and how long anybody waits meanwhile."""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cairn.cli.bench_fleet import EVENT_BLOCKS, QUERY_BLOCKS, events_of, feed, prompt_of, warm

SOURCES = 64
MILLIONS = (1, 10)
#: To look for stalls in, at least.
SECONDS = 2.0
_ROUNDS = 5


def run_snapshot(million: int) -> dict[str, float]:
    """64 sources that hold the same prompts; medians of five. hold: the longest time for which a snapshot keeps events
    out (nothing keeps lookups out), in its thread's own time. lookup, event: the longest of all calls, and the
    99.9th percentile, beside snapshots and alone; lookups are of 8,192 blocks, events store a block and remove it.
    """
    from cairn.fleet import FleetIndex
    from cairn.fleet.snapshot import read_snapshot, rehearse, write_snapshot

    warm()
    rehearse()
    index = FleetIndex()
    prompts = max(2, million * 1_000_000 // (SOURCES * QUERY_BLOCKS))
    for seed in range(prompts):
        feed(index, SOURCES, events_of(seed, QUERY_BLOCKS, EVENT_BLOCKS[-1], lists=False))
    hashed = index.hashed(prompt_of(0, QUERY_BLOCKS))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "fleet"
        written = [write_snapshot(index, path) for _ in range(_ROUNDS)]
        result: dict[str, float] = {
            "worker_blocks": written[-1].worker_blocks,
            "bytes": written[-1].bytes,
            "write_s": statistics.median(one.seconds for one in written),
        }
        with _holds() as held:
            write_snapshot(index, path)
        result["hold_longest_cpu_ms"] = 1e3 * max(held)
        for name, call in (("lookup", lambda: index.match(hashed)), ("event", _one_more(index))):
            seconds = max(SECONDS, 3 * result["write_s"])
            result.update(_waits(f"{name}_alone", call, seconds, None))
            result.update(_waits(name, call, seconds, lambda: write_snapshot(index, path)))
        write_snapshot(index, path)
        result["read_s"] = statistics.median(_read(path, read_snapshot) for _ in range(3))
    return result


def _read(path: Path, read: Callable[..., Any]) -> float:
    from cairn.fleet import FleetIndex

    index, start = FleetIndex(), time.perf_counter()
    outcome = read(path, index, hold_back=False)
    assert outcome.worker_blocks
    return time.perf_counter() - start


def _one_more(index: Any) -> Callable[[], object]:
    """Calls that store and remove a block of the first source in turns."""
    from cairn.fleet import Removed, Source, Stored, Tier

    events = (Stored((1,), None, [9] * 16, 16, Tier.VRAM, b"", ()), Removed((1,), None, None))
    return lambda: [index.apply(Source("w0", 0), (event,)) for event in events]


@contextmanager
def _holds() -> Iterator[list[float]]:
    """Seconds of the thread's own time that each hold of the writers' lock takes meanwhile."""
    from cairn.fleet.copying import SourceCopy

    found, before = list[float](), (SourceCopy.cut, SourceCopy._read)

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.thread_time()
            try:
                return call(*arguments)
            finally:
                found.append(time.thread_time() - start)

        return run

    SourceCopy.cut, SourceCopy._read = timed(before[0]), timed(before[1])  # type: ignore[method-assign]
    try:
        yield found
    finally:
        SourceCopy.cut, SourceCopy._read = before  # type: ignore[method-assign]


def _waits(
    name: str, call: Callable[[], object], seconds: float, beside: Callable[[], object] | None
) -> dict[str, float]:
    """Milliseconds of calls in so many seconds, while `beside` is called again and again in another thread."""
    import numpy as np

    stop = threading.Event()

    def run() -> None:
        while beside is not None and not stop.is_set():
            beside()

    thread = threading.Thread(target=run)
    thread.start()
    spent, end = list[float](), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        spent.append(time.perf_counter() - start)
    stop.set()
    thread.join()
    return {f"{name}_ms_p999": float(1e3 * np.percentile(spent, 99.9)), f"{name}_ms_longest": 1e3 * max(spent)}
