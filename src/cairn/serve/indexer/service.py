"""The service as a process: HTTP and gRPC on one event loop, events on a thread of their own, a bounded end."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Final, NamedTuple

import uvicorn

from cairn.config.schema import Cluster, Index
from cairn.errors import InputError
from cairn.observe.log import setup_logging
from cairn.serve.auth import check_exposure
from cairn.serve.indexer.app import make_app
from cairn.serve.indexer.parts import Parts
from cairn.serve.indexer.rpc import make_server

#: How long a thread may keep the interpreter's lock while another waits for it, seconds. Python's 5 ms would be what a
#: lookup waits whenever events come in.
_SWITCH_S: Final = 0.0005

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_CONNECTIONS: Final = 4096


class Addresses(NamedTuple):
    """Where the service listens; rpc: None without gRPC."""

    http: str
    rpc: str | None


def run(config: Index, cluster: Cluster, started: Callable[[Addresses], None]) -> None:
    """Serves until SIGTERM or SIGINT; `started` is called once it listens. From a process's main thread.

    cluster: where an etcd is named, whose instances are followed too, as they come and go. Raises ConfigError,
    InputError or ClusterError, in one line, for what cannot be served so. At the end running requests have half
    of `config.shutdown_s`; a process that is still there after all of it ends itself.
    """
    token = None if config.token is None else config.token.get_secret_value()
    check_exposure(config.host, token)
    setup_logging(config.log_level)
    sys.setswitchinterval(_SWITCH_S)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config, cluster, token, started))


async def _serve(config: Index, cluster: Cluster, token: str | None, started: Callable[[Addresses], None]) -> None:
    listening = _listen(config.host, config.http_port)
    parts = Parts(config)
    try:
        rpc = port = None
        if config.rpc_port is not None:
            rpc, port = make_server(parts, token, _address(config.host, config.rpc_port))
        async with AsyncExitStack() as stack:
            ended = stack.enter_context(_ended_by_signals(config.shutdown_s))
            await asyncio.to_thread(parts.start, config)
            await stack.enter_async_context(_discovered(cluster, parts))
            http = _Server(_settings(parts, token, config.shutdown_s / 2))
            serving = asyncio.create_task(http.serve([listening]))
            if rpc is not None:
                await rpc.start()
            await _until_begun(http, serving)
            at = _address(config.host, listening.getsockname()[1])
            started(Addresses(at, None if port is None else _address(config.host, port)))
            await ended.wait()
            http.should_exit = True
            await asyncio.gather(serving, *([rpc.stop(config.shutdown_s / 2)] if rpc is not None else []))
    finally:
        listening.close()
        parts.close()


@asynccontextmanager
async def _discovered(cluster: Cluster, parts: Parts) -> AsyncIterator[None]:
    """Follows whoever registers. Raises ClusterError if the registry does not answer now; later it may be away."""
    if not cluster.etcd_addr:
        yield
        return
    from cairn.cluster import Directory, Keys, open_registry
    from cairn.fleet.discovery import Discovery

    async with (
        open_registry(cluster) as registry,
        Directory(registry, Keys(cluster.namespace)) as directory,
        Discovery(directory, parts.following),
    ):
        yield


class _Server(uvicorn.Server):
    """uvicorn without its own handling of signals: gRPC ends with it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _settings(parts: Parts, token: str | None, grace_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(parts, token),
        loop="none",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )


async def _until_begun(http: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    while not http.started and not serving.done():
        await asyncio.sleep(0.01)
    if serving.done():
        await serving


@contextmanager
def _ended_by_signals(patience_s: float) -> Iterator[asyncio.Event]:
    """An event that a signal sets, and a bound on how long the process lives on then."""
    ended, loop = asyncio.Event(), asyncio.get_running_loop()

    def end() -> None:
        if not ended.is_set():
            timer = threading.Timer(patience_s, os._exit, (1,))
            timer.daemon = True
            timer.start()
        ended.set()

    for one in _SIGNALS:
        loop.add_signal_handler(one, end)
    try:
        yield ended
    finally:
        for one in _SIGNALS:
            loop.remove_signal_handler(one)


def _listen(host: str, port: int) -> socket.socket:
    """Raises InputError for what is in use, or is not this host's."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        where, why = _address(host, port), os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise InputError(f"HTTP on {where}: {why}; name another with --http-port or --host") from None


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    with contextlib.suppress(ImportError):  # there is none for Windows
        import uvloop

        return uvloop.new_event_loop
    return None
