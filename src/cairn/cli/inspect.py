"""`cairn inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli.output import show


def inspect(
    path: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Cache directory of a disk tier.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every frame and check it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show what a cache directory holds, without changing it.

    \b
    Example:
      cairn inspect /var/cache/cairn --verify
    """
    import msgspec

    from cairn.tier.inspection import inspect_directory

    show(msgspec.to_builtins(inspect_directory(path, verify=verify)), title=f"cairn inspect {path}", as_json=as_json)
