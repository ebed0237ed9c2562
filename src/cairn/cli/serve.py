"""`cairn serve`: OpenAI's API in front of a cluster's engines."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cairn.serve.gateway.service import Addresses

_Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one key; repeatable.")]
_Config = Annotated[Path | None, typer.Option("--config", help="YAML file; CAIRN_CONFIG names it if left out.")]


def serve(
    backends: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            metavar="[NAME=]URL[,...]",
            help="An engine, where none register in etcd; options: role, model, events, replay, ranks; repeatable.",
        ),
    ] = None,
    etcd_addr: Annotated[
        str | None, typer.Option(help="Members of etcd, as host:port, with commas between: who registers is served by.")
    ] = None,
    http_server_port: Annotated[int | None, typer.Option(help="Port of OpenAI's API; 0: a free one.")] = None,
    rpc_server_port: Annotated[int | None, typer.Option(help="Port of gRPC; 0: a free one; none if left out.")] = None,
    tokenizer_path: Annotated[
        str | None, typer.Option(help="The models' tokenizer: a directory or hub name; several: index.models.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; any but loopback needs keys.")] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Clients' keys, a line each; or CAIRN_SERVE__API_KEYS."),
    ] = None,
    file: _Config = None,
    settings: _Settings = [],  # noqa: B006 (typer copies it)
) -> None:
    """Serve OpenAI's API in front of engines: each request goes to the one that is ready soonest.

    \b
    Example:
      cairn serve --backend a=http://10.0.0.1:8000 --backend b=http://10.0.0.2:8000
    """
    import os

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it logs to stderr what comes back as an error

    from cairn.config import load_config, parse_assignment
    from cairn.serve.gateway.service import run

    given: dict[str, Any] = {
        "serve.backends": backends,
        "serve.http_server_port": http_server_port,
        "serve.rpc_server_port": rpc_server_port,
        "serve.tokenizer_path": tokenizer_path,
        "serve.host": host,
        "serve.api_keys": None if api_key_file is None else _lines(api_key_file),
        "cluster.etcd_addr": etcd_addr,
    }
    overrides = dict(map(parse_assignment, settings))
    overrides |= {key: value for key, value in given.items() if value is not None}
    run(load_config(file, overrides=overrides), _say)


def _say(addresses: "Addresses") -> None:
    rpc = f", gRPC on {addresses.rpc}" if addresses.rpc else ""
    typer.echo(f"cairn serve: HTTP on http://{addresses.http}{rpc}")


def _lines(path: Path) -> list[str]:
    from cairn.errors import InputError

    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-key-file {path}: cannot be read: {error}") from None
