"""The picture: time to first token, without Cairn and with, on a log scale."""

from pathlib import Path

from cairn.cli.demo.report import Report
from cairn.cli.demo.show import seconds
from cairn.errors import StorageError

_GREY, _LIGHT, _BLUE, _TEAL = "#8a8f98", "#b9c3d0", "#1f6fb4", "#2a9d8f"


def draw(report: Report, path: Path) -> None:
    """Writes a PNG: a bar for each way to the first token (the median), a dot for each question."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summary, questions = report.summary(), report.questions
    bars = [
        ("plain Transformers", summary.ttft_plain_s, [q.plain.ttft_s for q in questions], _GREY),
        ("Cairn, first time\n(computes, stores)", summary.ttft_cold_s, [], _LIGHT),
        ("Cairn, from DRAM", summary.ttft_dram_s, [q.dram.ttft_s for q in questions], _BLUE),
        ("Cairn, from disk\nafter a restart", summary.ttft_disk_s, [q.disk.ttft_s for q in questions], _TEAL),
    ]
    figure, axes = plt.subplots(figsize=(10, 4.6), dpi=150)
    shortest = min(min([value, *dots]) for _, value, dots, _ in bars)
    for row, (_, value, dots, colour) in enumerate(bars):
        axes.barh(row, value, color=colour, height=0.62)
        axes.plot(dots, [row] * len(dots), "o", color="black", markersize=3.5, alpha=0.7)
        times = summary.ttft_plain_s / value
        faster = f"   {times:,.0f} times sooner" if times >= 1.5 else ""
        axes.text(max([value, *dots]) * 1.12, row, f"{seconds(value)}{faster}", va="center", fontsize=12, weight="bold")
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=11)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(shortest / 3, summary.ttft_plain_s * 8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms")
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.set_xlabel("time to first token (log scale; bar: median, dots: questions)", fontsize=10)
    axes.set_title(
        f"{report.prompt_tokens:,}-token prompt: prefill once, reuse anywhere", fontsize=14, weight="bold", loc="left"
    )
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.text(0.012, 0.015, _caption(report), fontsize=8, color="#555555", va="bottom")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    try:
        figure.savefig(path)
    except OSError as error:
        raise StorageError(f"--output {path}: {error.strerror}; name a file that can be written") from error
    finally:
        plt.close(figure)


def _caption(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    same = "all answers identical" if report.summary().identical else "ANSWERS DIFFER"
    return f"{report.model}, {report.dtype}; {report.machine}; {report.date}; {versions}; {same}"
