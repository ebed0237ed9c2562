"""`cairn node`: the host's node, in this terminal or in the background."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cairn.cli.config import Settings, load

if TYPE_CHECKING:
    from cairn.config import Config
    from cairn.node.peering import Peering
    from cairn.node.server import Node

_SWITCH_S = 0.0005
#: How long a node may take until it listens, seconds.
_START_S = 120.0
#: How long a node may take to answer `--check`, seconds.
_CHECK_S = 5.0


def node(
    file: Annotated[Path | None, typer.Argument(help="YAML file; CAIRN_CONFIG names it if left out.")] = None,
    address: Annotated[str | None, typer.Option(help="Where to listen, as ipc:///run/cairn/node.sock.")] = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay here, log to stderr, end on Ctrl-C.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Ask the node there; exit code 1: no answer.")] = False,
    settings: Settings = [],  # noqa: B006 (typer copies it)
) -> None:
    """Keep the KV cache of all engines on this host, in memory that they share.

    Without --foreground it goes on in the background, and logs beside its socket. SIGTERM ends it in order.

    \b
    Example:
      cairn node --address ipc:///run/cairn/node.sock --set storage.cpu.size=64GiB --foreground
    """
    from cairn.errors import ConfigError
    from cairn.node.address import socket_path

    config = load(file, settings)
    address = address or config.node.address
    if address is None:
        raise ConfigError("node.address is missing: give --address ipc:///run/cairn/node.sock, or set it in the file")
    path = socket_path(address)
    if check:
        from cairn.node.ping import ping

        ping(address, _CHECK_S)
        typer.echo(f"node at {address}: answers")
        return
    if foreground:
        _serve(config, address)
        return
    from cairn.node.notify import start_in_background

    log = path.with_name(path.name + ".log")
    typer.echo(f"node at {address}, process {start_in_background(address, log, _START_S)}, log in {log}")


def _serve(config: "Config", address: str) -> None:
    """Until SIGTERM or SIGINT; a second one ends the flush, too."""
    import gc
    import logging
    import signal
    from functools import partial

    from cairn.engine.pool import open_pool, prepare
    from cairn.node.notify import tell_ready
    from cairn.node.server import Node
    from cairn.observe.log import setup_logging

    # The loop waits for no disk thread's Python longer than this, instead of 5 ms.
    sys.setswitchinterval(_SWITCH_S)
    setup_logging("DEBUG" if config.engine.log_level == "DEBUG" else "INFO", config.observe.log_format)
    log = logging.getLogger("cairn.node")
    prepare(config)
    peering = _peering(config)
    node = Node(config, address, partial(open_pool, peers=peering.tier) if peering else open_pool)
    shown = ExitStack()
    previous = {number: signal.signal(number, lambda *_: node.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if config.observe.http_port is not None:
            shown.enter_context(_shown(config, node, address))
        if peering is not None:
            log.info("answering peers at %s", peering.serve(node))
        log.info("listening at %s; up to %d bytes of DRAM", address, config.storage.cpu.size)
        tell_ready()
        gc.freeze()  # what is there now stays: a collection that looked at it would hold up calls for milliseconds
        node.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        shown.close()
        log.info("stopping; flushing for up to %g s", config.node.stop_timeout_s)
        if peering is not None:
            peering.leave()
        node.close(config.node.stop_timeout_s)
        if peering is not None:
            peering.close()
        log.info("stopped")


def _peering(config: "Config") -> "Peering | None":
    if config.node.peers.address is None:
        return None
    from cairn.node.peering import Peering

    return Peering(config)


@contextmanager
def _shown(config: "Config", node: "Node", address: str) -> Iterator[None]:
    """Metrics and dashboard over HTTP."""
    import logging

    from cairn.observe.http import PagesServer
    from cairn.observe.prometheus import PoolsCollector, metrics_page
    from cairn.serve.dashboard import PAGE, STATE, page_files
    from cairn.serve.dashboard.node import NodeShown, state_page

    with state_page(NodeShown(address, node)) as state:
        pages = {"/metrics": metrics_page(PoolsCollector(node.counted)), STATE: state}
        files = {path: lambda _, file=file: file for path, file in page_files().items()}
        with PagesServer(config.observe, pages, files) as server:
            logging.getLogger("cairn.node").info("dashboard at %s%s", server.url, PAGE)
            yield
