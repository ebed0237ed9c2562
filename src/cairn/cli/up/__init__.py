"""`cairn up`: a whole cluster on this machine from one file, and `cairn status`: how it stands."""

import json
from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[Path, typer.Option("--dir", file_okay=False, help="Where logs and state are kept.")]


def up(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What there is to be, in YAML.")],
    home: Home = Path("cairn-cluster"),
) -> None:
    """Run a cluster on this machine, here, until Ctrl-C: engines, node, etcd, service.

    \b
    Example:
      cairn up cluster.yaml
    """
    from cairn.cli.up.plan import children_of
    from cairn.cli.up.spec import load_spec
    from cairn.cli.up.supervisor import Supervisor

    supervisor = Supervisor(children_of(load_spec(file), home), home, typer.echo)
    raise typer.Exit(supervisor.run())


def status(
    home: Home = Path("cairn-cluster"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show how the cluster that `cairn up` runs stands; exit code 1 unless all of it does.

    \b
    Example:
      cairn status
    """
    from cairn.cli.up.state import read_state

    state = read_state(home)
    if as_json:
        typer.echo(json.dumps(state, indent=2))
    else:
        for name, one in state["children"].items():
            typer.echo(f"{name:12}{one['state']:10}{one['url'] or '':32}process {one['pid']}, log in {one['log']}")
    if not all(one["state"] == "ready" for one in state["children"].values()):
        raise typer.Exit(1)
