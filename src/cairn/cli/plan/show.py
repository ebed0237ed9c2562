"""A plan for people: what it takes in a line or two, and all fleets in a table."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from cairn.sim.study import TIERS_TO_BUY


def amount(size: float) -> str:
    """Bytes in decimal units, as they are bought."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.3g} {name}" if size < 1000 * unit else f"{size / unit:,.0f} {name}"
    return "-" if not size else f"{size:,.0f} B"


def show_plan(result: Mapping[str, Any]) -> None:
    console = Console()
    demand = result["demand"]
    console.print(
        f"{result['trace']}: {result['requests']:,} requests at {demand['rate']:.3g}/s, "
        f"{amount(result['distinct_bytes'])} of KV; {result['possible_hit_percent']:.1f} % of the tokens can be hits"
    )
    for line in needs(result):
        console.print(f"  {line}")
    _table(console, result)
    best = result["cheapest"]
    slo = (
        f"{demand['slo_percent']:g} % of the requests within {demand['ttft_slo_s']:g} s to the first token and "
        f"{demand['tbt_slo_s']:g} s between tokens"
    )
    console.print(f"cheapest fleet with {slo}: {_describe(best)}" if best else f"no fleet has {slo}")
    console.print(
        f"{result['simulated_requests']:,} requests simulated in {result['simulated_in_s']:,} s, "
        f"{result['simulated_machine']}"
    )


def needs(result: Mapping[str, Any]) -> list[str]:
    """For each kind of fleet and each tier, how much reaches 90 % of the possible hits."""
    lines = []
    for one in result["needed_for_90_percent"]:
        size = one["total_bytes"]
        kind = f"{one['instances']} instances, {one['policy']}, {one['codec']}"
        reached = f"90 % of the possible hits with {amount(size)}" if size else "90 % of the possible hits: not reached"
        hosts = -(-one["instances"] // result["per_host"])
        each = f" ({amount(size / hosts)} a host)" if size and one["tier"] != "remote" and hosts > 1 else ""
        lines.append(f"{one['tier']} alone, {kind}: {reached}{each}")
    return lines


def _describe(row: Mapping[str, Any]) -> str:
    tiers = [f"{amount(row[f'{tier}_bytes'])} {tier}" for tier in TIERS_TO_BUY if row[f"{tier}_bytes"]]
    cost = f", {row['cost_per_hour']:,.2f} an hour" if row["cost_per_hour"] else ""
    return f"{row['instances']} instances, {' + '.join(tiers) or 'no tiers'}, {row['policy']}, {row['codec']}{cost}"


def _table(console: Console, result: Mapping[str, Any]) -> None:
    rows = result["fleets"]
    table = Table(box=None, header_style="bold")
    kinds = [name for name in ("policy", "codec", "scheduler") if len({row[name] for row in rows}) > 1]
    priced = any(row["cost_per_hour"] for row in rows)
    names = ["instances", "DRAM a host", "disk a host", "remote", *kinds]
    names += [
        "hits %",
        "of possible",
        "TTFT p50",
        "p95",
        "TPOT p95",
        "goodput/s",
        "in SLO",
        *(["an hour"] * priced),
        "",
    ]
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [str(row["instances"]), *(amount(row[f"{tier}_bytes"]) for tier in TIERS_TO_BUY)]
        cells += [row[name] for name in kinds]
        cells += [f"{row['hit_percent']:.1f}", f"{row['of_possible_percent']:.0f} %"]
        cells += [f"{row[name]:.3g} s" for name in ("ttft_p50_s", "ttft_p95_s", "tbt_p95_s")]
        cells += [f"{row['goodput']:.3g}", f"{row['good_percent']:.1f} %"]
        cells += [f"{row['cost_per_hour']:,.2f}"] * priced
        table.add_row(*cells, "meets SLO" if row["meets_slo"] else "")
    console.print(table)
