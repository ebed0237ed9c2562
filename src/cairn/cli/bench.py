"""`cairn bench`: measures this machine. Each bench is a function of its own, imported when it runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cairn.cli.output import help_if_alone, machine, show

app = typer.Typer(
    callback=help_if_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Measure this machine; medians, never best cases.",
)

AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]


@app.command()
def engine(as_json: AsJson = False) -> None:
    """Store, retrieve and look up in DRAM, beside bare memcpy.

    \b
    Example:
      cairn bench engine --json
    """
    from cairn.cli.bench_engine import run_engine

    _report("engine", run_engine(), as_json)


@app.command()
def disk(
    directory: Annotated[
        Path | None,
        typer.Option("--dir", exists=True, file_okay=False, help="On the disk to measure; temporary files by default."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read and write a disk tier, beside bare O_DIRECT I/O.

    \b
    Example:
      cairn bench disk --dir /var/cache --json
    """
    from cairn.cli.bench_disk import run_disk

    _report("disk", run_disk(directory), as_json)


@app.command()
def index(as_json: AsJson = False) -> None:
    """Allocate and evict in a full prefix index.

    \b
    Example:
      cairn bench index --json
    """
    from cairn.cli.bench_index import run_index

    _report("index", run_index(), as_json)


@app.command()
def policy(
    trace: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Requests, a JSON object a line.")],
    as_json: AsJson = False,
) -> None:
    """Replay a trace: hit rate of every policy, beside Belady.

    \b
    Example:
      cairn bench policy conversation_trace.jsonl --json
    """
    from cairn.cli.bench_policy import run_policy

    _report("policy", run_policy(trace), as_json)


def _report(name: str, result: dict[str, Any], as_json: bool) -> None:
    where = machine()
    if as_json:
        show({**result, "machine": where}, title=name, as_json=True)
    else:
        show(result, title=f"cairn bench {name}", as_json=False)
        typer.echo(f"on {where['cpu']}, {where['cores']} cores, kernel {where['kernel']}, {where['date']}")
