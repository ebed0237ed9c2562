"""The fleet's index beside NVIDIA Dynamo's `RadixTree` (Rust, with its Python binding), in turns on one machine.

    PYTHONPATH=src .venv/bin/python benchmarks/peers/dynamo_radix.py --out benchmarks/results/fleet.json

Dynamo's lives in a venv of its own:

    python3 -m venv /tmp/dynamo-venv && /tmp/dynamo-venv/bin/pip install ai-dynamo-runtime==1.6.1 msgspec

In every round both make an index of their own, in a process of their own, and hear one story from all workers: the
same msgpack payloads, as vLLM publishes them, one event in each. Who begins changes from round to round. Then both
answer the same query 300 times: a prompt of 8,192 blocks, hashed beforehand; the answer is the matched prefix of every
worker. Memory is what the process grew by.

`RadixTree` takes JSON with block keys that somebody has computed; what lies between is done as fast as Python can, and
its parts are kept apart: `decode` (msgspec, typed), `hash` (Dynamo's own `compute_block_hash_for_seq`), `json`
(msgspec) and `apply`. `ready_blocks_per_s` is what it would take in if the first three cost nothing. Cairn's parts are
`decode` (bytes to events) and `apply` (hashing, and the index).
"""

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from kv_publisher import write_story

CASES = ((64, 8192, 64), (64, 8192, 512), (1000, 1024, 64), (1000, 1024, 512))
BLOCK_TOKENS, QUERY_BLOCKS, QUERIES = 16, 8192, 300
#: (figure, whether more is better, what Cairn's must be of Dynamo's: at least, or at most).
BARS = (
    ("ingest_blocks_per_s", True, 1.0),
    ("query_us_p50", False, 1.0),
    ("query_us_p99", False, 1.0),
    ("process_bytes_per_worker_block", False, 0.5),
)


def measure_dynamo(workers: int, blocks: int, story: Path) -> dict[str, float]:
    """Runs in Dynamo's venv, which has no numpy."""
    import msgspec
    from dynamo._core import RadixTree, compute_block_hash_for_seq
    from kv_publisher import read_story

    class Told(msgspec.Struct, tag="BlockStored", gc=False):
        block_hashes: list[int]
        parent_block_hash: int | None
        token_ids: list[int]
        block_size: int

    class Batch(msgspec.Struct, array_like=True, gc=False):
        ts: float
        events: list[Told]
        rank: int | None

    class Block(msgspec.Struct, gc=False):
        block_hash: int
        tokens_hash: int
        mm_extra_info: None = None

    class Stored(msgspec.Struct, gc=False):
        parent_hash: int | None
        blocks: list[Block]

    class Data(msgspec.Struct, gc=False):
        stored: Stored

    class Event(msgspec.Struct, gc=False):
        event_id: int
        data: Data
        dp_rank: int | None

    decode, encode, clock = msgspec.msgpack.Decoder(Batch).decode, msgspec.json.Encoder().encode, time.perf_counter
    payloads = read_story(story)
    tokens = [token for payload in payloads for event in decode(payload).events for token in event.token_ids]
    generator = random.Random(2)
    tokens += [generator.randrange(128_000) for _ in range(BLOCK_TOKENS * (QUERY_BLOCKS - blocks))]
    query = compute_block_hash_for_seq(tokens, BLOCK_TOKENS)
    before = resident_bytes()
    tree, parts = RadixTree(), dict.fromkeys(("decode", "hash", "json", "apply"), 0.0)
    for worker in range(workers):
        for number, payload in enumerate(payloads):
            times = [clock()]
            batch = decode(payload)
            times.append(clock())
            for told in batch.events:
                keys = compute_block_hash_for_seq(told.token_ids, told.block_size)
                times.append(clock())
                made = list(map(Block, told.block_hashes, keys))
                text = encode(Event(number, Data(Stored(told.parent_block_hash, made)), batch.rank))
                times.append(clock())
                tree.apply_event(worker, text)
                times.append(clock())
            for part, (start, stop) in zip(parts, pairwise(times), strict=True):
                parts[part] += stop - start
    grown = resident_bytes() - before
    samples = [timed(lambda: tree.find_matches(query)) for _ in range(QUERIES)]
    hashing = [timed(lambda: compute_block_hash_for_seq(tokens, BLOCK_TOKENS)) for _ in range(20)]
    scores = tree.find_matches(query).scores
    if len(scores) != workers or set(scores.values()) != {blocks}:
        raise SystemExit("Dynamo's RadixTree does not find what it was told")
    cuts, told_blocks = statistics.quantiles(samples, n=100), workers * blocks
    return {
        "ingest_blocks_per_s": told_blocks / sum(parts.values()),
        "ready_blocks_per_s": told_blocks / parts["apply"],
        **{f"{part}_ns_per_block": 1e9 * spent / told_blocks for part, spent in parts.items()},
        "process_bytes_per_worker_block": grown / told_blocks,
        "query_us_p50": 1e6 * cuts[49],
        "query_us_p99": 1e6 * cuts[98],
        "hash_of_query_us_p50": 1e6 * statistics.median(hashing),
    }


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    found = call()
    spent = time.perf_counter() - start
    del found
    return spent


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def one(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compare(case: tuple[int, int, int], rounds: int, dynamo_python: str) -> dict[str, Any]:
    from cairn.cli.bench_fleet_wire import payloads_of

    workers, blocks, event_blocks = case
    with tempfile.TemporaryDirectory() as folder:
        story = Path(folder) / "story"
        write_story(story, payloads_of(1, blocks, event_blocks))
        contenders = {
            "cairn": [sys.executable, "-m", "cairn.cli.bench_fleet", "wire", *map(str, case), "1"],
            "dynamo": [dynamo_python, __file__, "--child", str(workers), str(blocks), str(story)],
        }
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for turn in range(rounds):
            for name in sorted(contenders, reverse=bool(turn % 2)):
                runs[name].append(one(contenders[name]))
    medians = {
        name: {figure: statistics.median(run[figure] for run in done) for figure in done[0]}
        for name, done in runs.items()
    }
    ratios = {f"{figure}_ratio": medians["cairn"][figure] / medians["dynamo"][figure] for figure, _, _ in BARS}
    met = {
        f"{figure}_met": (ratios[f"{figure}_ratio"] >= bar) if more else (ratios[f"{figure}_ratio"] <= bar)
        for figure, more, bar in BARS
    }
    every = {name: [round(run["ingest_blocks_per_s"]) for run in done] for name, done in runs.items()}
    return {**medians, **ratios, **met, "ingest_blocks_per_s_by_round": every}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dynamo-venv", type=Path, default=Path("/tmp/dynamo-venv"))
    parser.add_argument(
        "--alone", action="store_true", help="only the comparison, not what `cairn bench fleet` measures"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        workers, blocks, story = args.child
        print(json.dumps(measure_dynamo(int(workers), int(blocks), Path(story))))
        return
    from cairn.cli.bench_fleet import run_fleet
    from cairn.cli.output import machine

    result: dict[str, Any] = {} if args.alone else run_fleet()
    python = str(args.dynamo_venv / "bin" / "python")
    load = os.getloadavg()
    result["dynamo"] = {
        "load_before": load[0],
        "version": "ai-dynamo-runtime 1.6.1",
        "rounds": args.rounds,
        **{f"{w}x{b}_by_{per}": compare((w, b, per), args.rounds, python) for w, b, per in CASES},
    }
    result["machine"] = machine() | {"command": shlex.join(["python", *sys.argv])}
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
