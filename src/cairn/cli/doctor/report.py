"""What was found, for people and for machines."""

import json
from collections import Counter
from itertools import groupby
from typing import Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cairn.cli.doctor.base import CHECKS, Diagnosis, Finding, Severity

_STYLES: Final = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.NOTE: "bold cyan"}


def show(diagnosis: Diagnosis, *, as_json: bool) -> None:
    """Prints the findings, worst first, and what could not be looked at."""
    if as_json:
        findings = [one._asdict() for one in diagnosis.findings]
        typer.echo(json.dumps({"sound": diagnosis.sound, "findings": findings, "skipped": diagnosis.skipped}, indent=2))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    for one in diagnosis.findings:
        console.print(_lines(one))
    console.print(_summary(diagnosis))
    table = Table.grid(padding=(0, 2))
    for lack, names in groupby(diagnosis.skipped, key=diagnosis.skipped.__getitem__):
        table.add_row("skipped", f"{', '.join(names)}: {lack}", style="dim")
    console.print(table)


def _lines(finding: Finding) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=7)
    table.add_column()
    table.add_row(Text(finding.severity, _STYLES[finding.severity]), Text(finding.check, "bold"))
    table.add_row("found", Text(finding.found))
    table.add_row("why", Text(finding.why, "dim"))
    table.add_row("fix", Text(finding.fix, "green"))
    table.add_row()
    return table


def _summary(diagnosis: Diagnosis) -> Text:
    looked = len(CHECKS) - len(diagnosis.skipped)
    counts = Counter(one.severity for one in diagnosis.findings)
    if not counts:
        return Text(f"sound: {looked} checks, nothing found", "bold green")
    each = ", ".join(f"{counts[kind]} {kind}{'s' * (counts[kind] > 1)}" for kind in Severity if counts[kind])
    return Text(f"{each}; {looked} checks", "bold")
