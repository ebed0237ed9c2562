"""What the demo shows while it runs: lines that stay, and under them one live line for what is under way."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cairn.cli.demo.child import Tick
from cairn.cli.demo.events import Answer
from cairn.cli.demo.report import Report


def seconds(value: float) -> str:
    """Three digits, in s or ms."""
    if value < 1:
        return f"{value * 1e3:.0f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def megabytes(size: int) -> str:
    """In MB (10**6 bytes)."""
    return f"{size / 1e6:,.1f} MB" if size else "0"


class Screen:
    """A console with at most one live line. Owned by one thread.

    `quiet` (for `--json`) sends everything to stderr, so that stdout holds the JSON alone.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=quiet, highlight=False)

    def heading(self, text: str) -> None:
        """A line that opens a part of the demo."""
        self.console.print(Text(f"\n{text}", style="bold"))

    def line(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self.console.print(Text(f"  {text}", style=style))

    def question(self, number: int, text: str) -> None:
        """A question as it is first asked."""
        self.line(f"Q{number + 1} {text}")

    def answer(self, answer: Answer, plain: Answer | None) -> None:
        """What became of one request; `plain` is the same one without Cairn, None if this is it."""
        self.line(f"Q{answer.question + 1} TTFT {seconds(answer.ttft_s):>6}{_moved(answer, plain)}")
        if plain is None or answer.token_ids != plain.token_ids:
            different = "" if plain is None else "ANOTHER ANSWER: "
            self.line(f"   {different}{' '.join(answer.text.split())}", style="italic" if plain is None else "red")

    @contextmanager
    def working(
        self, what: str, total_bytes: int | None = None, done_bytes: Callable[[], int] | None = None
    ) -> Iterator[Tick]:
        """A live line for something that takes a while; yields what has to be called now and then meanwhile."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        if total_bytes:
            columns = (*columns, BarColumn(), DownloadColumn())  # type: ignore[assignment]
        started = time.monotonic()
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(what, total=total_bytes)
            yield lambda: progress.update(task, completed=done_bytes() if done_bytes else None)
        self.line(f"{what}: {time.monotonic() - started:.0f} s", style="dim")

    @contextmanager
    def request(self) -> Iterator["LiveRequest"]:
        """A live line for the requests of one process."""
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            yield LiveRequest(progress)


class LiveRequest:
    """The live line of a request: what it waits for, then the answer as it comes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)

    def tick(self) -> None:
        """Nothing new; the clock on the line runs by itself."""

    def show(self, text: str, restart: bool = False) -> None:
        """Replaces the text; `restart` sets its clock to zero."""
        if restart:
            self._progress.reset(self._task)
        width = max(20, self._progress.console.width - 16)
        line = " ".join(text.split())
        self._progress.update(self._task, description=line if len(line) < width else line[: width - 1] + "…")


def _moved(answer: Answer, plain: Answer | None) -> str:
    """The tokens reused and the KV bytes moved."""
    if plain is None:
        return ""
    tiers = ((answer.dram_tokens, "DRAM"), (answer.disk_tokens, "disk"))
    reused = " and ".join(f"{tokens:,} tokens from {tier}" for tokens, tier in tiers if tokens)
    loaded = f"; {reused} ({megabytes(answer.loaded_bytes)})" if reused else "; nothing reused"
    return loaded + (f", {megabytes(answer.stored_bytes)} stored" if answer.stored_bytes else "")


def show_report(screen: Screen, report: Report, plot: Path) -> None:
    """The table at the end."""
    summary = report.summary()
    screen.heading(f"Time to the first token of {report.prompt_tokens:,}-token prompts")
    table = Table()
    table.add_column("")
    for name in ("plain", "Cairn first", "from DRAM", "from disk", "reused", "answers"):
        table.add_column(name, justify="right")
    for number, question in enumerate(report.questions):
        table.add_row(
            f"Q{number + 1}",
            seconds(question.plain.ttft_s),
            seconds(question.cold.ttft_s) if question.cold else "",
            seconds(question.dram.ttft_s),
            seconds(question.disk.ttft_s),
            f"{question.dram.dram_tokens / question.dram.prompt_tokens:.1%}",
            "identical" if question.identical else "DIFFERENT",
        )
    table.add_section()
    shares = (f"{value / summary.ttft_plain_s:.1%}" for value in (summary.ttft_dram_s, summary.ttft_disk_s))
    medians = (summary.ttft_plain_s, summary.ttft_cold_s, summary.ttft_dram_s, summary.ttft_disk_s)
    table.add_row("median", *map(seconds, medians), style="bold")
    table.add_row("of plain", "", "", *shares, style="bold")
    screen.console.print(table)
    screen.line(f"{report.model}, {report.dtype}, {report.machine}, {report.date}")
    screen.line(f"plot: {plot}")
