"""A plan for people: what it takes in a line or two, and all fleets in a table."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from cairn.sim.study import TIERS_TO_BUY

_KEY = (
    "DRAM and disk: of a host; hits: % of the possible; TTFT: p50 and p95, TPOT: p95, in seconds; "
    "good: requests a second within the SLO; SLO: % of the requests within it, * if enough; cost: of an hour"
)

#: Columns that the table may take: in a narrow terminal its lines wrap, and no figure is cut.
_WIDTH = 160

NAMES = {"dram": "DRAM", "disk": "disk", "remote": "remote"}


def amount(size: float) -> str:
    """Bytes in decimal units, as they are bought."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.3g} {name}" if size < 1000 * unit else f"{size / unit:,.0f} {name}"
    return "-" if not size else f"{size:,.0f} B"


def show_plan(result: Mapping[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    console.width = max(console.width, _WIDTH)
    demand = result["demand"]
    console.print(
        f"{result['trace']}: {result['requests']:,} requests at {demand['rate']:.3g}/s, "
        f"{amount(result['distinct_bytes'])} of KV; {result['possible_hit_percent']:.1f} % of the tokens can be hits\n"
    )
    _table(console, result)
    for line in needs(result):
        console.print(line)
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
    found = result["needed_for_90_percent"]
    kinds = [name for name in ("instances", "policy", "codec", "scheduler") if len({one[name] for one in found}) > 1]
    lines = []
    for one in found:
        size, hosts = one["total_bytes"], -(-one["instances"] // result["per_host"])
        kind = "".join(f", {one[name]}{' instances' * (name == 'instances')}" for name in kinds)
        each = f" ({amount(size / hosts)} a host)" if size and one["tier"] != "remote" and hosts > 1 else ""
        reached = "not with any size" if size is None else f"with {amount(size)}{each}" if size else "without it"
        lines.append(f"{NAMES[one['tier']]} alone{kind}: 90 % of the possible hits {reached}")
    return lines


def _describe(row: Mapping[str, Any]) -> str:
    tiers = [f"{amount(row[f'{tier}_bytes'])} {NAMES[tier]}" for tier in TIERS_TO_BUY if row[f"{tier}_bytes"]]
    cost = f", {row['cost_per_hour']:,.2f} an hour" if row["cost_per_hour"] else ""
    return f"{row['instances']} instances, {' + '.join(tiers) or 'no tiers'}, {row['policy']}, {row['codec']}{cost}"


def _table(console: Console, result: Mapping[str, Any]) -> None:
    rows = result["fleets"]
    kinds = [name for name in ("policy", "codec", "scheduler") if len({row[name] for row in rows}) > 1]
    priced = any(row["cost_per_hour"] for row in rows)
    names = ["fleet", "DRAM", "disk", "remote", *kinds, "hits", "TTFT", "p95", "TPOT", "good", "SLO"]
    table = Table(box=None, padding=(0, 1), caption=_KEY, caption_justify="left")
    for name in [*names, *(["cost"] * priced)]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{row['instances']} x", *(amount(row[f"{tier}_bytes"]) for tier in TIERS_TO_BUY)]
        cells += [row[name] for name in kinds]
        cells += [f"{row['of_possible_percent']:.0f}"]
        cells += [f"{row[name]:.2f}" for name in ("ttft_p50_s", "ttft_p95_s")]
        cells += [f"{row['tbt_p95_s']:.3f}", f"{row['goodput']:.1f}"]
        cells += [f"{row['good_percent']:.1f} {'*' if row['meets_slo'] else ' '}"]
        cells += [f"{row['cost_per_hour']:,.2f}"] * priced
        table.add_row(*cells)
    console.print(table)
