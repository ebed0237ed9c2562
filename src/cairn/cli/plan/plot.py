"""The picture of a plan: hits and time to the first token over the size of each tier."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cairn.cli.plan.show import NAMES, amount
from cairn.errors import InputError, StorageError
from cairn.sim.advice import ENOUGH, curves, needed
from cairn.sim.study import TIERS_TO_BUY

_COLOURS = {"dram": "#1f6fb4", "disk": "#2a9d8f", "remote": "#d1495b"}
_MARKERS = {"dram": "o", "disk": "s", "remote": "^"}
_WIDTHS = {"dram": 4.0, "disk": 2.0, "remote": 1.5}  # curves may lie on one another
_STYLES = ("-", "--", ":", "-.")
_FONT = 10  # points, in lines that take _LINE of the axes' height
_LINE = 0.065


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Writes an SVG or PNG, by the suffix. One curve a tier and kind of fleet. Raises InputError where no tier has two
    sizes, StorageError where the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [(tier, kind, curve) for tier in TIERS_TO_BUY for kind, curve in curves(result["fleets"], tier).items()]
    if not lines:
        raise InputError("--plot: nothing to draw over; give at least two sizes of one tier")
    figure, (hits, ttft) = plt.subplots(1, 2, figsize=(12, 5), dpi=130)
    kinds = list(dict.fromkeys(kind for _, kind, _ in lines))
    for tier, kind, curve in lines:
        style = {
            "color": _COLOURS[tier],
            "linestyle": _STYLES[kinds.index(kind) % len(_STYLES)],
            "linewidth": _WIDTHS[tier],
            "marker": _MARKERS[tier],
            "markersize": 6,
            "label": f"{NAMES[tier]}{_kind(kind, kinds)}",
        }
        points = [row for row in curve if row[f"{tier}_bytes"]]
        x = [row[f"{tier}_total_bytes"] / 1e9 for row in points]
        hits.plot(x, [row["of_possible_percent"] for row in points], **style)
        ttft.plot(x, [row["ttft_p95_s"] for row in points], **style)
    _hits(hits, lines, kinds)
    _ttft(ttft, result, lines)
    for axes in (hits, ttft):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: amount(value * 1e9))
        axes.grid(visible=True, color="#e3e3e3", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("size of one tier in the whole fleet, the others at their least")
    _save(figure, result, path)
    plt.close(figure)


def _hits(axes: Any, lines: Sequence[tuple[str, Any, Any]], kinds: Sequence[Any]) -> None:
    """The share of the possible hits, where each curve crosses 90 %, and how much that is, in words."""
    low = min(row["of_possible_percent"] for _, _, curve in lines for row in curve)
    bottom = max(0.0, low - 5)
    each = _line_height(len(lines))
    axes.axhline(ENOUGH, color="black", linewidth=1, linestyle=(0, (4, 3)))
    for i, (tier, kind, curve) in enumerate(lines):
        colour, size = _COLOURS[tier], needed(curve, tier)
        axes.axhline(curve[0]["of_possible_percent"], color="#8a8f98", linewidth=1, linestyle=":")
        best = max(row["of_possible_percent"] for row in curve)
        reached = f"{best:.0f} % at most" if size is None else f"90 % with {amount(size)}" if size else "not needed"
        text = f"{NAMES[tier]}{_kind(kind, kinds)}: {reached}"
        words = {"color": colour, "weight": "bold", "size": _FONT * each / _LINE, "va": "top"}
        axes.text(0.02, 0.98 - each * i, text, transform=axes.transAxes, **words)
        if size:
            axes.plot([size / 1e9] * 2, [bottom, ENOUGH], color=colour, linewidth=1, linestyle=(0, (1, 2)))
            axes.plot(
                size / 1e9, ENOUGH, _MARKERS[tier], color=colour, markersize=10, markeredgecolor="black", zorder=5
            )
    axes.set_ylim(bottom, bottom + (102 - bottom) / (0.97 - each * len(lines)))  # curves stay below the words
    axes.set_yticks([tick for tick in range(0, 101, 10) if tick >= bottom])
    axes.set_ylabel("% of the possible hits")
    axes.set_title("What reaches 90 % of the possible hits", loc="left", weight="bold")


def _ttft(axes: Any, result: Mapping[str, Any], lines: Sequence[tuple[str, Any, Any]]) -> None:
    slo = result["demand"]["ttft_slo_s"]
    axes.axhline(slo, color="black", linewidth=1, linestyle=(0, (4, 3)))
    axes.text(0.01, slo, f" SLO {slo:g} s", va="bottom", transform=axes.get_yaxis_transform(), fontsize=10)
    for _, _, curve in lines:
        axes.axhline(curve[0]["ttft_p95_s"], color="#8a8f98", linewidth=1, linestyle=":")
    axes.set_ylim(0, 1.15 * max(slo, *(row["ttft_p95_s"] for _, _, curve in lines for row in curve)))
    axes.set_ylabel("seconds")
    axes.set_title("Time to the first token, p95", loc="left", weight="bold")
    size = _FONT * _line_height(len(lines)) / _LINE
    axes.legend(loc="lower left", framealpha=0.8, edgecolor="none", fontsize=size, handlelength=3)


def _line_height(lines: int) -> float:
    """Of the words on the left, in heights of the axes: they take half of it at most."""
    return min(_LINE, 0.5 / lines)


def _kind(kind: tuple[Any, ...], kinds: Sequence[tuple[Any, ...]]) -> str:
    """What tells a kind of fleet from the others that are drawn."""
    differing = [i for i in range(len(kind)) if len({one[i] for one in kinds}) > 1]
    parts = [f"{kind[i]} instances" if i == 0 else str(kind[i]) for i in differing]
    return f", {', '.join(parts)}" if parts else ""


def _save(figure: Any, result: Mapping[str, Any], path: Path) -> None:
    demand = result["demand"]
    counts = " and ".join(map(str, sorted({row["instances"] for row in result["fleets"]})))
    figure.text(
        0.01,
        0.01,
        f"{result['trace']}, {result['requests']:,} requests at {demand['rate']:.3g}/s, {counts} instances of "
        f"{result['simulated_machine']}; possible hits: {result['possible_hit_percent']:.1f} % of the prompt tokens; "
        "dotted: the GPUs' own cache alone",
        fontsize=8,
        color="#555555",
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise StorageError(f"--plot {path}: {error}; name a file that can be written, .svg or .png") from None
