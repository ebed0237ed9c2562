"""What every command shows: JSON for machines, a table for people, and where a figure was measured."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from cairn import __version__


def machine() -> dict[str, Any]:
    """Where and how a figure was measured: the head of every benchmark result."""
    from cairn.config.urls import mask_url  # brings pydantic

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cairn": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["cairn", *map(mask_url, sys.argv[1:])]),
    }


def show(result: Mapping[str, Any], *, title: str, as_json: bool) -> None:
    """Prints a result: as JSON, or as a table with a row for each figure, nested names joined by dots.

    What holds the same figures for several things ({"1000": {"lru": 1}, "3000": {"lru": 2}}) gets a table of its own,
    with a column for each thing.
    """
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)  # names are anybody's, and addresses have brackets: [fe80::1]
    parts = {title: {"value": {name: value for name, value in result.items() if not _is_matrix(value)}}}
    parts |= {name: value for name, value in result.items() if _is_matrix(value)}
    for name, columns in parts.items():
        table = Table("figure", title=name, title_justify="left")
        for column in columns:
            table.add_column(column, justify="right")
        cells = [dict(_rows(column)) for column in columns.values()]
        for figure in cells[0]:
            table.add_row(figure, *(cell[figure] for cell in cells))
        console.print(table)


def check_writable(path: Path, option: str) -> None:
    """Raises StorageError now if the file that an option names could not be written at the end."""
    from cairn.errors import StorageError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise StorageError(f"{option} {path}: {error.strerror}; name a file that can be written") from error


def help_if_alone(context: typer.Context) -> None:
    """The callback of a group of commands: without a command, its help."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _is_matrix(value: object) -> bool:
    """Whether each of several mappings holds the same figures."""
    if (
        not isinstance(value, Mapping)
        or len(value) < 2
        or not all(isinstance(item, Mapping) for item in value.values())
    ):
        return False
    return len({tuple(dict(_rows(item))) for item in value.values()}) == 1


def _rows(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, list):
            yield from _rows({str(i): item for i, item in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _cell(value)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
