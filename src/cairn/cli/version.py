"""`cairn version`."""

import importlib.metadata
import json
import platform
from typing import Annotated

import typer

from cairn import __version__

_PACKAGES = ("numpy", "numba", "torch", "transformers")


def version(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """Show the versions of Cairn and of what it stands on.

    \b
    Example:
      cairn version --json
    """
    versions = {"cairn": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if as_json:
        typer.echo(json.dumps(versions))
    else:
        typer.echo("\n".join(f"{name:13}{number}" for name, number in versions.items()))
