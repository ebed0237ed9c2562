"""`cairn index`: the fleet's index as a service."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cairn.serve.indexer.service import Addresses

_Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one key; repeatable.")]
_Config = Annotated[Path | None, typer.Option("--config", help="YAML file; CAIRN_CONFIG names it if left out.")]


def index(
    instances: Annotated[
        list[str] | None,
        typer.Option(
            "--instance",
            metavar="NAME=ENDPOINT[,...]",
            help="A publisher to follow; options: replay=ENDPOINT, bind, rank=N, topic=TEXT, model=NAME; repeatable.",
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME=PATH", help="A model's tokenizer: a directory or hub name; repeatable."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; any but loopback needs a token.")] = None,
    http_port: Annotated[int | None, typer.Option(help="Port of HTTP; 0: a free one.")] = None,
    rpc_port: Annotated[int | None, typer.Option(help="Port of gRPC; 0: a free one.")] = None,
    no_rpc: Annotated[bool, typer.Option("--no-rpc", help="No gRPC.")] = False,
    etcd_addr: Annotated[
        str | None,
        typer.Option(help="Members of etcd, as host:port, with commas between: who registers there is followed."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Holds the bearer token; or set CAIRN_INDEX__TOKEN."),
    ] = None,
    file: _Config = None,
    settings: _Settings = [],  # noqa: B006 (typer copies it)
) -> None:
    """Serve which instance of a fleet holds how much of a prompt: HTTP and gRPC.

    \b
    Example:
      cairn index --instance a=tcp://10.0.0.1:5557,replay=tcp://10.0.0.1:5558 --model llama=/models/llama
    """
    import os

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it logs to stderr what comes back as an error

    from cairn.config import load_config, parse_assignment
    from cairn.serve.indexer.service import run

    given: dict[str, Any] = {
        "instances": instances,
        "models": None if models is None else dict(map(_model, models)),
        "host": host,
        "http_port": http_port,
        "rpc_port": rpc_port,
        "token": None if token_file is None else _read(token_file),
    }
    overrides = dict(map(parse_assignment, settings))
    overrides |= {f"index.{key}": value for key, value in given.items() if value is not None}
    if no_rpc:
        overrides["index.rpc_port"] = None
    if etcd_addr is not None:
        overrides["cluster.etcd_addr"] = etcd_addr
    config = load_config(file, overrides=overrides)
    run(config, _say)


def _say(addresses: "Addresses") -> None:
    rpc = f", gRPC on {addresses.rpc}" if addresses.rpc else ""
    typer.echo(f"cairn index: HTTP on http://{addresses.http}{rpc}")


def _model(text: str) -> tuple[str, str]:
    from cairn.errors import InputError

    name, _, path = text.partition("=")
    if not name or not path:
        raise InputError(f"--model {text!r}: must be NAME=PATH, as in llama=/models/llama")
    return name, path


def _read(path: Path) -> str:
    from cairn.errors import InputError

    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token-file {path}: cannot be read: {error}") from None
