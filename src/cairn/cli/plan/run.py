"""`cairn plan` itself: options to fleets, their simulation, and what is said of it."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import typer

from cairn.cli.output import machine as describe_machine
from cairn.cli.plan.plot import draw
from cairn.cli.plan.show import show_plan
from cairn.config.sizes import parse_size
from cairn.errors import InputError
from cairn.index import POLICIES
from cairn.plan.schedule import SCHEDULERS
from cairn.sim.advice import cheapest, instances, needed_by_tier, options, sizes
from cairn.sim.logs import open_trace
from cairn.sim.machine import Machine, read_machine
from cairn.sim.study import CODECS, Demand, Fleet, Prices, Study, all_of, one_at_a_time, possible_tokens, run
from cairn.sim.trace import Trace

_KNOWN: dict[str, Mapping[str, Any]] = {"policy": POLICIES, "codec": CODECS, "scheduler": SCHEDULERS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The command's options; chosen: what a fleet may be, by the names of `Fleet`'s fields, None where left out."""

    trace: Path
    machine: str
    rate: float | None
    chosen: Mapping[str, Sequence[Any] | None]
    per_host: int
    every: bool
    slo: tuple[float, float, float]
    prices: Sequence[str]
    requests: int | None
    block_tokens: int
    processes: int
    plot: Path | None
    as_json: bool


def run_plan(asked: Asked) -> None:
    """Simulates and shows. Raises InputError for what cannot be simulated."""
    trace = open_trace(asked.trace, asked.block_tokens, asked.requests)
    machine, demand = read_machine(asked.machine), _demand(asked, trace)
    study = Study(machine=machine, demand=demand, per_host=asked.per_host, prices=_prices(asked.prices))
    found = _options(asked, trace, machine, demand)
    fleets = all_of(found) if asked.every else one_at_a_time(found)
    began = time.perf_counter()
    rows = run(
        study,
        trace,
        fleets,
        requests=asked.requests,
        processes=min(asked.processes, len(fleets)),
        tick=lambda done: typer.echo(f"{done} of {len(fleets)} fleets", err=True),
    )
    each = max(len(trace), asked.requests or 0)
    result = {
        "trace": asked.trace.name,
        "requests": each,
        "simulated_requests": each * len(fleets),
        "simulated_in_s": round(time.perf_counter() - began, 1),
        "block_tokens": trace.block_tokens,
        "distinct_bytes": len(trace.keys) * trace.block_tokens * machine.token_bytes,
        "possible_hit_percent": round(100 * possible_tokens(trace) / int(trace.input_tokens.sum()), 2),
        "demand": asdict(demand),
        "per_host": asked.per_host,
        "simulated_machine": asked.machine,
        "needed_for_90_percent": needed_by_tier(rows),
        "cheapest": cheapest(rows),
        "fleets": rows,
        "machine": describe_machine(),
    }
    if asked.plot:
        draw(result, asked.plot)
    if asked.as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        show_plan(result)


def _demand(asked: Asked, trace: Trace) -> Demand:
    span = float(trace.times[-1] - trace.times[0])
    if asked.rate is None and span <= 0:
        raise InputError(f"{asked.trace}: all requests at one time; say how many come a second with --rate")
    ttft, tpot, percent = asked.slo
    rate = asked.rate or len(trace) / span
    return Demand(rate=rate, ttft_slo_s=ttft, tbt_slo_s=tpot, slo_percent=percent)


def _options(asked: Asked, trace: Trace, machine: Machine, demand: Demand) -> dict[str, list[Any]]:
    """What each field of a fleet may be; sizes as bytes, and where none are given all tiers' defaults."""
    chosen = {name: list(values) for name, values in asked.chosen.items() if values}
    for name, known in _KNOWN.items():
        for value in chosen.get(name, ()):
            if value not in known:
                raise InputError(f"--{name} {value}: must be one of {', '.join(known)}")
    found = options(Fleet(instances=instances(trace, machine, demand)))
    given = [name for name in chosen if name.endswith("_bytes")]
    for name in given:
        chosen[name] = [_size(value, name) for value in chosen[name]]
    if not given:
        chosen |= {f"{tier}_bytes": sizes(trace, machine.token_bytes) for tier in machine.links}
    return found | chosen


def _size(text: str, name: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise InputError(f"--{name.removesuffix('_bytes')} {text}: {error}") from None


def _prices(given: Sequence[str]) -> Prices:
    known = [one.name for one in fields(Prices)]
    found: dict[str, float] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise InputError(f"--price {text}: must be NAME=NUMBER") from None
        if name not in known or not 0 <= found[name] < float("inf"):
            raise InputError(f"--price {text}: must be one of {', '.join(known)}, and a number from 0 on")
    return Prices(**found)
