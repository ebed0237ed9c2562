"""What simulated fleets say to a buyer: how large a tier has to be, and which fleet is the cheapest that will do."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from cairn.sim.machine import Machine
from cairn.sim.study import TIERS_TO_BUY, Demand, Fleet
from cairn.sim.trace import Trace

Row = Mapping[str, Any]  # of `Study.simulate`

#: Which share of the possible hits a tier should reach, in percent. The last tenth takes many times the room.
ENOUGH = 90.0

_KINDS = ("instances", "policy", "codec", "scheduler")


def sizes(trace: Trace, token_bytes: int) -> list[int]:
    """To try of a tier: none, and up to all of the trace's distinct blocks in steps of four, in whole GB."""
    footprint = len(trace.keys) * trace.block_tokens * token_bytes
    return [0, *sorted({max(1, math.ceil(footprint / 4**i / 1e9)) * 10**9 for i in range(5)})]


def instances(trace: Trace, machine: Machine, demand: Demand) -> int:
    """As many as compute all prompts anew at 80 % of their time, by the machine's costs, decodes left out."""
    prefill = 0.0
    for n in trace.input_tokens.tolist():
        prefill += machine.work_s(n, n * n / 2, 0, 0)
    return max(1, math.ceil(prefill / len(trace) * demand.rate / 0.8))


def curves(rows: Sequence[Row], tier: str) -> dict[tuple[Any, ...], list[Row]]:
    """By number of instances, policy, codec and scheduler: fleets that differ in `tier` alone, the smallest first. The
    other tiers are as small as any simulated: most often empty. A codec is the remote tier's: of others there is one.
    """
    others = [f"{name}_bytes" for name in TIERS_TO_BUY if name != tier]
    least = [min(row[name] for row in rows) for name in others]
    found: dict[tuple[Any, ...], list[Row]] = {}
    codecs = {row["codec"] for row in rows} if tier == "remote" else {rows[0]["codec"]}
    for row in rows:
        if row["codec"] in codecs and [row[name] for name in others] == least:
            found.setdefault(tuple(row[name] for name in _KINDS), []).append(row)
    return {kind: sorted(part, key=lambda row: row[f"{tier}_bytes"]) for kind, part in found.items() if len(part) > 1}


def needed(curve: Sequence[Row], tier: str, share: float = ENOUGH) -> int | None:
    """Bytes of a tier in the whole fleet that reach `share` percent of the possible hits; None: no simulated size does.

    Between two simulated sizes by the logarithm of the size.
    """
    size = f"{tier}_total_bytes"
    if curve[0]["of_possible_percent"] >= share:
        return int(curve[0][size])
    for below, above in pairwise(curve):
        low, high = below["of_possible_percent"], above["of_possible_percent"]
        if low < share <= high:
            part = (share - low) / (high - low)
            return int(max(below[size], 10**9) ** (1 - part) * above[size] ** part)
    return None


def needed_by_tier(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """`needed` of each tier, for each kind of fleet that was simulated with several sizes of it."""
    return [
        {**dict(zip(_KINDS, kind, strict=True)), "tier": tier, "total_bytes": needed(curve, tier)}
        for tier in TIERS_TO_BUY
        for kind, curve in curves(rows, tier).items()
    ]


def cheapest(rows: Iterable[Row]) -> Row | None:
    """Of the fleets that meet the SLO the one that costs least.

    At equal prices, or without any, the one with the fewest instances, then the least DRAM, disk and remote storage.
    """
    good = [row for row in rows if row["meets_slo"]]
    sizes = [f"{tier}_total_bytes" for tier in TIERS_TO_BUY]
    return min(
        good, key=lambda row: (row["cost_per_hour"], row["instances"], *(row[size] for size in sizes)), default=None
    )


def options(base: Fleet) -> dict[str, list[Any]]:
    """A fleet as options of one value each."""
    return {name: [getattr(base, name)] for name in Fleet.__slots__}
