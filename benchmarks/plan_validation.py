"""Simulated against real: TTFT of a small conversation workload, as `cairn plan` sees it and as a stack serves it.

    PYTHONPATH=src python benchmarks/plan_validation.py --out benchmarks/results/plan_validation.json

The stack is Transformers on the CPU with SmolLM2-135M (float32) and Cairn's DRAM and disk. Some users hold
conversations that begin with a system prompt of all; a turn's prompt is everything said so far. The stack serves one
request at a time, in the order in which they come, at seeded times that keep it busy for `--load` of the time; waiting
is worked out from the measured times of the requests before. Between two requests the machine is calibrated (`cairn
bench machine`), by visits to another cache of the same model, so both see the same noise of the machine; the
calibration knows nothing of the workload's own times. Everything is measured by two clocks: the wall's, and the
processor time of this process, which other work on the machine changes less.
"""

import argparse
import json
import shlex
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cairn.cli.bench_machine import Calibration, Stack, Visit, load_model, machine_of, probe_sizes
from cairn.cli.output import machine as describe_machine
from cairn.kv import KeyChain, KVGeometry
from cairn.plan.schedule import RoundRobin
from cairn.sim.fleet import FleetSettings, FleetSim
from cairn.sim.machine import Machine
from cairn.sim.trace import Trace

SYSTEM, FIRST, TURN, ANSWER = 128, (200, 700), (24, 200), 16
DRAM_TOKENS, DISK_TOKENS = 3_000, 40_000


@dataclass(slots=True)
class Turn:
    """A request of the workload: whose, its new tokens, and what became of it."""

    user: int
    new: list[int]
    arrival: float = 0.0
    ids: list[int] | None = None
    visit: Visit | None = None


def workload(users: int, turns: int, seed: int) -> tuple[list[int], list[Turn]]:
    """The system prompt, and the turns in their order: users take them at random."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return rng.integers(1000, 40_000, count).tolist()

    order = rng.permutation(np.repeat(np.arange(users), turns)).tolist()
    seen: set[int] = set()
    made = []
    for user in order:
        made.append(Turn(user, tokens(int(rng.integers(*(TURN if user in seen else FIRST))))))
        seen.add(user)
    return tokens(SYSTEM), made


def serve(stack: Stack, calibration: Calibration, system: list[int], turns: list[Turn]) -> None:
    """Serves all turns for real, a calibrating visit behind each."""
    said: dict[int, list[int]] = {}
    for one in turns:
        one.ids = said.get(one.user, system) + one.new
        one.visit = stack.ask(one.ids, ANSWER)
        said[one.user] = one.ids + one.visit.answer
        calibration.visit()


def queue(machine: Machine, turns: list[Turn], load: float, seed: int) -> np.ndarray:
    """TTFT as measured [turns], for turns that come at random times and are served one at a time, each as long as it
    was. load: of the time of a server that computes every turn's new tokens, by the calibrated costs.
    """
    mean = float(np.mean([machine.work_s(len(one.new), len(one.new) ** 2 / 2, 0, 0) for one in turns]))
    gaps = np.random.default_rng(seed + 1).exponential((mean + ANSWER * machine.floor_s) / load, len(turns))
    free, found = 0.0, []
    for one, arrival in zip(turns, np.cumsum(gaps).tolist(), strict=True):
        one.arrival = arrival
        began = max(arrival, free)
        found.append(began - arrival + one.visit.ttft_s)
        free = began + one.visit.total_s
    return np.array(found)


def simulate(machine: Machine, turns: list[Turn]) -> tuple[np.ndarray, dict[str, int]]:
    """TTFT of each turn, and tokens that were not computed by tier."""
    block, chains, asked = machine.block_tokens, [], []
    for one in turns:
        chain = KeyChain(bytes(16), block, one.ids)
        asked.append(len(chain))
        chain.extend(one.visit.answer[:-1])  # the last token's KV is never computed
        chains.append((chain.keys[:, 0] >> np.uint64(1)).tolist())
    times = [one.arrival for one in turns]
    trace = Trace.of(times, chains, [(len(one.ids), ANSWER) for one in turns], asked, block)
    settings = FleetSettings(
        instances=1, machine=machine, blocks={"dram": DRAM_TOKENS // block, "disk": DISK_TOKENS // block}
    )
    outcome = FleetSim(trace, RoundRobin(), len(turns) / (times[-1] - times[0]), settings).run()
    return outcome.ttft_s, dict(outcome.held_tokens)


def figures(ttft: np.ndarray) -> dict[str, float]:
    return {"mean_s": float(ttft.mean()), "p50_s": float(np.median(ttft)), "p95_s": float(np.percentile(ttft, 95))}


def compare(turns: list[Turn], visits: list[Visit], geometry: KVGeometry, load: float, seed: int) -> dict[str, Any]:
    """The real turns beside the simulated ones, by one clock."""
    machine = machine_of(visits, geometry)
    real = queue(machine, turns, load, seed)
    simulated, by_tier = simulate(machine, turns)
    found, expected = figures(real), figures(simulated)
    ratios = {name: expected[name] / found[name] for name in found}
    tiers = sorted({tier for one in turns for tier in one.visit.reused})
    return {
        "real": {**found, "tokens": {tier: sum(one.visit.reused.get(tier, 0) for one in turns) for tier in tiers}},
        "simulated": {**expected, "tokens": by_tier},
        "simulated_over_real": ratios,
        "within_15_percent": {name: abs(ratio - 1) <= 0.15 for name, ratio in ratios.items()},
        "correlation": float(np.corrcoef(real, simulated)[0, 1]),
        "ttft_s": {"real": real.round(4).tolist(), "simulated": simulated.round(4).tolist()},
        "served_in_s": [round(one.visit.ttft_s, 4) for one in turns],
        "calibrated": asdict(machine),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    model = load_model(args.model)
    system, turns = workload(args.users, args.turns, args.seed)
    with ExitStack() as held:
        home = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="cairn-plan-", dir=args.dir)))
        probe = held.enter_context(Stack(model, home / "probe", *probe_sizes(model)))
        geometry = probe.geometry
        token = geometry.token_bytes
        stack = held.enter_context(Stack(model, home / "asked", DRAM_TOKENS * token, DISK_TOKENS * token))
        for one in (probe, stack):
            one.ask(list(range(100, 164)), 2)
        calibration = Calibration(probe, args.seed)
        for _ in range(12):
            calibration.visit()
        serve(stack, calibration, system, turns)
    by_cpu = [replace(one, visit=one.visit.by_cpu()) for one in turns]
    return {
        "requests": len(turns),
        "prompt_tokens": sum(len(one.ids) for one in turns),
        "wall": compare(turns, calibration.visits, geometry, args.load, args.seed),
        "cpu": compare(by_cpu, [one.by_cpu() for one in calibration.visits], geometry, args.load, args.seed),
        "calibrating_visits": len(calibration.visits),
        "threads": torch.get_num_threads(),
        "options": {"users": args.users, "turns": args.turns, "load": args.load, "seed": args.seed},
        "machine": describe_machine() | {"command": shlex.join(["python", *sys.argv])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory; SmolLM2-135M-Instruct by default")
    parser.add_argument("--dir", type=Path, help="on the disk to use")
    parser.add_argument("--users", type=int, default=6)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--load", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = run(args)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for clock in ("wall", "cpu"):
        print(clock, {name: result[clock][name] for name in ("real", "simulated", "simulated_over_real")})


if __name__ == "__main__":
    main()
