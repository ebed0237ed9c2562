"""What could be bought, each simulated: a trace against fleets with other numbers of instances and sizes of tiers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import numpy as np

from cairn.errors import InputError
from cairn.index import DEFAULT_POLICY
from cairn.plan import Coded
from cairn.plan.schedule import DEFAULT_SCHEDULER, SCHEDULERS
from cairn.sim.fleet import FleetSettings, FleetSim
from cairn.sim.machine import Link, Machine
from cairn.sim.outcome import Outcome
from cairn.sim.trace import Trace

HOURS_A_MONTH = 730

#: Stored bytes a byte of bf16, and seconds that a core decodes one for: docs/compression.md (SmolLM2's KV; decoding of
#: drawn values in Llama-3.1-8B's shape, one core of an AMD EPYC). The remote tier's alone: nothing else is compressed.
CODECS: dict[str, Coded] = {
    "none": Coded(1.0, 0.0),
    "packed": Coded(11.3 / 16, 1 / 1.6e9),
    "int8": Coded(9.1 / 16, 1 / 0.832e9),
    "cachegen-near-lossless": Coded(5.39 / 16, 1 / 0.853e9),
    "cachegen-high": Coded(4.23 / 16, 1 / 0.828e9),
    "cachegen-balanced": Coded(3.49 / 16, 1 / 0.806e9),
    "cachegen-small": Coded(2.8 / 16, 1 / 0.842e9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What is bought. dram_bytes, disk_bytes: of a host, which `per_host` instances share; remote_bytes: of all."""

    instances: int = 1
    dram_bytes: int = 0
    disk_bytes: int = 0
    remote_bytes: int = 0
    policy: str = DEFAULT_POLICY
    codec: str = "none"
    scheduler: str = DEFAULT_SCHEDULER

    def total_bytes(self, tier: str, per_host: int) -> int:
        """Of a tier, in the whole fleet."""
        size = int(getattr(self, f"{tier}_bytes"))
        return size if tier == "remote" else size * -(-self.instances // per_host)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What all fleets are asked for. rate: requests a second; slo_percent: of the requests are to be within both."""

    rate: float
    ttft_slo_s: float = 2.0
    tbt_slo_s: float = 0.1
    slo_percent: float = 95.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """gpu: of an instance an hour; the others of a GB (10^9 bytes) a month. In any currency."""

    gpu: float = 0.0
    dram: float = 0.0
    disk: float = 0.0
    remote: float = 0.0

    def hourly(self, fleet: Fleet, per_host: int) -> float:
        monthly: float = sum(getattr(self, tier) * fleet.total_bytes(tier, per_host) / 1e9 for tier in TIERS_TO_BUY)
        return self.gpu * fleet.instances + monthly / HOURS_A_MONTH


TIERS_TO_BUY = ("dram", "disk", "remote")


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """machine: of each instance; codec_threads: of an instance that decode what comes from the remote tier."""

    machine: Machine
    demand: Demand
    per_host: int = 1
    prices: Prices = field(default_factory=Prices)
    codec_threads: int = 8

    def simulate(self, trace: Trace, fleet: Fleet) -> dict[str, Any]:
        """One fleet under the trace: what it is, what it costs an hour, and its figures."""
        demand = self.demand
        simulated = FleetSim(trace, SCHEDULERS[fleet.scheduler](), demand.rate, self.settings(trace, fleet)).run()
        figures = simulated.figures(len(trace) / demand.rate, demand.ttft_slo_s, demand.tbt_slo_s)
        row = {
            **{name: getattr(fleet, name) for name in Fleet.__slots__},
            **{f"{tier}_total_bytes": fleet.total_bytes(tier, self.per_host) for tier in TIERS_TO_BUY},
            "cost_per_hour": round(self.prices.hourly(fleet, self.per_host), 4),
            **_hits(trace, simulated),
            **figures,
        }
        row["meets_slo"] = bool(row["good_percent"] >= demand.slo_percent)
        return row

    def settings(self, trace: Trace, fleet: Fleet) -> FleetSettings:
        """The simulator's, with tiers counted in blocks as they are stored."""
        machine, block = self.machine, self.machine.token_bytes * trace.block_tokens
        coded = CODECS[fleet.codec]
        links = dict(machine.links)
        if "remote" in links:
            way = links["remote"]
            byte_s = coded.share / way.bytes_s + coded.decode_s / self.codec_threads
            links["remote"] = Link(way.latency_s, 1 / byte_s)
        return FleetSettings(
            instances=fleet.instances,
            per_host=self.per_host,
            machine=replace(
                machine,
                block_tokens=trace.block_tokens,
                blocks=machine.blocks * machine.block_tokens // trace.block_tokens,
                links=links,
            ),
            blocks={
                "dram": fleet.dram_bytes // block,
                "disk": fleet.disk_bytes // block,
                "remote": int(fleet.remote_bytes / (block * coded.share)),
            },
            eviction=fleet.policy,
            ttft_slo_s=self.demand.ttft_slo_s,
            tbt_slo_s=self.demand.tbt_slo_s,
        )


def _hits(trace: Trace, outcome: Outcome) -> dict[str, Any]:
    """hit_percent: of all prompt tokens; of_possible_percent: of those that the largest cache could hit."""
    possible = possible_tokens(trace)
    held = sum(outcome.held_tokens.values())
    tokens = int(trace.input_tokens.sum())
    return {
        "hit_percent": round(100 * held / tokens, 2),
        "hit_percent_by_tier": {tier: round(100 * n / tokens, 2) for tier, n in sorted(outcome.held_tokens.items())},
        "of_possible_percent": round(100 * held / possible, 1) if possible else 100.0,
    }


def possible_tokens(trace: Trace) -> int:
    """Prompt tokens that somebody had asked for before: what one cache without bounds, for all, would hit."""
    return int(np.minimum(trace.reused() * trace.block_tokens, trace.input_tokens - 1).sum())


def one_at_a_time(options: Mapping[str, Sequence[Any]]) -> list[Fleet]:
    """All instance counts, policies, codecs and schedulers; of the tiers each by itself, the others at their first."""
    rest = [name for name in options if not name.endswith("_bytes")]
    tiers = [name for name in options if name.endswith("_bytes")]
    first = {name: options[name][0] for name in tiers}
    chosen = [dict(zip(rest, values, strict=True)) for values in product(*(options[name] for name in rest))]
    sizes = [first, *({**first, name: size} for name in tiers for size in options[name][1:])]
    return [Fleet(**one, **size) for one in chosen for size in sizes]


def all_of(options: Mapping[str, Sequence[Any]]) -> list[Fleet]:
    """Every combination."""
    return [Fleet(**dict(zip(options, values, strict=True))) for values in product(*options.values())]


_trace: Trace | None = None


def _prepare(trace: Trace, requests: int | None) -> None:
    global _trace
    _trace = trace.repeated(requests) if requests and requests > len(trace) else trace


def _one(study: Study, fleet: Fleet) -> dict[str, Any]:
    assert _trace is not None
    return study.simulate(_trace, fleet)


def run(
    study: Study,
    trace: Trace,
    fleets: Sequence[Fleet],
    *,
    requests: int | None = None,
    processes: int = 1,
    tick: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """`Study.simulate` of each, spread over processes. requests: repeat the trace up to so many (`Trace.repeated`).

    tick: called with how many are done. Raises InputError for a trace that does not fit the machine.
    """
    for name in TIERS_TO_BUY:
        if any(getattr(fleet, f"{name}_bytes") for fleet in fleets) and name not in study.machine.links:
            raise InputError(f"the machine has no link to {name}; add links.{name} with latency_s and bytes_s")
    return list(_results(study, trace, fleets, requests, processes, tick))


def _results(
    study: Study,
    trace: Trace,
    fleets: Sequence[Fleet],
    requests: int | None,
    processes: int,
    tick: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    if processes == 1:
        _prepare(trace, requests)
        for done, fleet in enumerate(fleets, 1):
            yield _one(study, fleet)
            tick(done)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _prepare, (trace, requests)) as pool:
        for done, row in enumerate(pool.map(partial(_one, study), fleets), 1):
            yield row
            tick(done)
