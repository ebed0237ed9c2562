"""The bench behind `cairn bench fleet-sim`: goodput of the schedulers on a simulated fleet, under a scaled trace."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cairn.plan.schedule import SCHEDULERS, SloAware
from cairn.sim.fleet import FleetSettings, FleetSim
from cairn.sim.trace import Trace, read_trace

RATES = (90.0, 120.0, 150.0, 180.0)

#: Goodput of the default scheduler over another's, at least; above 1 has to be exceeded.
BARS = {"round_robin": 1.3, "least_loaded": 1.0, "prefix_aware": 1.0}


def run_fleet_sim(
    trace: Path,
    rates: Sequence[float] = RATES,
    settings: FleetSettings | None = None,
    tick: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Each scheduler at each rate (requests a second, of the whole fleet), with the shared tier and without.

    Goodput: requests a second whose TTFT and mean time between tokens are within the SLO. `peak`: the best of all
    rates, each scheduler's own. Raises InputError for a trace that cannot be read.
    """
    requests = read_trace(trace)
    settings = settings or FleetSettings()
    fleets = {"shared_tier": settings, "no_shared_tier": replace(settings, blocks={})}
    result: dict[str, Any] = {"trace": trace.name, "requests": len(requests), "settings": asdict(settings)}
    for name, fleet in fleets.items():
        by_rate = {}
        for rate in rates:
            by_rate[f"{rate:g}"] = {scheduler: _run(requests, scheduler, rate, fleet, tick) for scheduler in SCHEDULERS}
        result[name] = {"by_rate": by_rate, **_peaks(by_rate)}
    return result


def _run(
    trace: Trace, scheduler: str, rate: float, settings: FleetSettings, tick: Callable[[str], None]
) -> dict[str, float]:
    outcome = FleetSim(trace, SCHEDULERS[scheduler](), rate, settings).run()
    figures = outcome.figures(len(trace) / rate, settings.ttft_slo_s, settings.tbt_slo_s)
    tick(f"{rate:g} requests/s, {scheduler}: {figures['goodput']} within the SLO")
    return figures


def _peaks(by_rate: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    peak = {name: max(figures[name]["goodput"] for figures in by_rate.values()) for name in SCHEDULERS}
    ratios = {name: round(peak[SloAware.name] / peak[name], 3) for name in BARS}
    return {
        "peak_goodput": peak,
        "peak_over": ratios,
        "meets_bars": {name: ratios[name] > bar if bar == 1 else ratios[name] >= bar for name, bar in BARS.items()},
    }
