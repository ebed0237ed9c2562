"""`cairn config`: what is set, whether it is right, and what could be."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cairn.cli.output import help_if_alone

if TYPE_CHECKING:
    from cairn.config import Config

app = typer.Typer(
    callback=help_if_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Show, check and document the configuration.",
)

Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one key; repeatable.")]


@app.command()
def show(
    file: Annotated[Path | None, typer.Argument(help="YAML file; CAIRN_CONFIG names it if left out.")] = None,
    settings: Settings = [],  # noqa: B006 (typer copies it)
    as_json: Annotated[bool, typer.Option("--json", help="For machines; sizes in bytes.")] = False,
) -> None:
    """Show every setting as it is in force.

    Defaults, file, CAIRN_* variables and overrides together, the later one winning.

    \b
    Example:
      cairn config show cairn.yaml --set storage.cpu.size=8GiB
    """
    config = load(file, settings)
    typer.echo(config.model_dump_json(indent=2, context="masked") if as_json else config.to_yaml().rstrip())


@app.command()
def check(
    file: Annotated[Path | None, typer.Argument(help="YAML file; CAIRN_CONFIG names it if left out.")] = None,
    settings: Settings = [],  # noqa: B006 (typer copies it)
) -> None:
    """Check a file and the CAIRN_* variables.

    Prints "ok", or what is wrong with exit code 2.

    \b
    Example:
      cairn config check cairn.yaml
    """
    load(file, settings)
    typer.echo("ok")


@app.command()
def schema() -> None:
    """Print the JSON schema of the file, for editors and validators.

    \b
    Example:
      cairn config schema > cairn.schema.json
    """
    from cairn.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


@app.command()
def docs() -> None:
    """Print the reference of all settings in Markdown.

    \b
    Example:
      cairn config docs > docs/configuration.md
    """
    from cairn.cli.config_docs import render

    typer.echo(render(), nl=False)


@app.command("import-lmcache")
def import_lmcache(
    file: Annotated[
        Path | None, typer.Argument(help="LMCache's YAML file; LMCACHE_CONFIG_FILE names it if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Print the configuration that LMCache's amounts to.

    Reads its file and the LMCACHE_* variables; comments say what became of every setting, and why some have no
    counterpart.

    \b
    Example:
      cairn config import-lmcache lmcache-config.yaml > cairn.yaml
    """
    import os

    from cairn.cli.lmcache import import_lmcache, read_lmcache, render

    imported = import_lmcache(read_lmcache(file, os.environ))
    if as_json:
        became = [one._asdict() for one in imported.settings]
        typer.echo(json.dumps({"config": imported.config, "settings": became}, indent=2, default=str))
    else:
        typer.echo(render(imported), nl=False)


def load(file: Path | None, settings: list[str]) -> "Config":
    from cairn.config import load_config, parse_assignment

    return load_config(file, overrides=dict(map(parse_assignment, settings)))
