"""`cairn doctor`: what is wrong with a configuration, this machine and the fleet, why it hurts, and the fix.

Probes (`probe`) gather facts (`facts`), pure checks (`checks`) judge them, `report` shows what was found.
"""

from pathlib import Path
from typing import Annotated

import typer

_Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one key; repeatable.")]


def doctor(
    file: Annotated[Path | None, typer.Argument(help="Cairn's YAML file; CAIRN_CONFIG names it if left out.")] = None,
    settings: _Settings = [],  # noqa: B006 (typer copies it)
    cluster: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="File of `cairn up`: its engines and settings.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="The model's directory, with its tokenizer.")
    ] = None,
    sample: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Text that prompts look like.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="What separates chunks; where blending is enabled its own if left out.")
    ] = None,
    wait_s: Annotated[
        float, typer.Option("--wait", min=0.1, max=600, help="Seconds to listen for KV events at most.")
    ] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    reference: Annotated[bool, typer.Option("--reference", help="Print what is looked for, in Markdown.")] = False,
) -> None:
    """Find what is wrong here, why it hurts, and the fix; exit code 1 when something is.

    Reads the configuration, this machine's limits, disk and memory, the remote store, etcd and the engines in it.
    Changes nothing.

    \b
    Example:
      cairn doctor cairn.yaml --model /models/llama --sample prompts.txt
    """
    import logging
    import os

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it logs to stderr what comes back as an error
    logging.getLogger("cairn").addHandler(logging.NullHandler())  # what fails is told as a finding

    if reference:
        from cairn.cli.doctor.reference import render

        typer.echo(render(), nl=False)
        return
    from cairn.cli.doctor import checks  # noqa: F401 - registers them
    from cairn.cli.doctor.base import diagnose
    from cairn.cli.doctor.probe import Given, gather
    from cairn.cli.doctor.report import show
    from cairn.cli.up.spec import load_spec
    from cairn.config import load_config, parse_assignment

    spec = load_spec(cluster) if cluster else None
    overrides = (spec.config if spec else {}) | dict(map(parse_assignment, settings))
    given = Given(spec, model, sample, separator, wait_s)
    diagnosis = diagnose(gather(load_config(file, overrides=overrides), given, os.environ))
    show(diagnosis, as_json=as_json)
    if not diagnosis.sound:
        raise typer.Exit(1)
