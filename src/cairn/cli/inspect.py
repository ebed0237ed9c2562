"""`cairn inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli.output import show


def inspect(
    path: Annotated[Path, typer.Argument(help="Cache directory of a disk tier.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every frame and check it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show what a cache directory holds, without changing it.

    \b
    Example:
      cairn inspect /var/cache/cairn --verify
    """
    from cairn.tier import inspect_directory

    show(inspect_directory(path, verify=verify), title=str(path), as_json=as_json)
