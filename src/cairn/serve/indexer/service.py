"""The service as a process: HTTP and gRPC on one event loop, events on threads of their own, a bounded end."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

from cairn.config.schema import Cluster, Config, Index
from cairn.observe.access import check_exposure
from cairn.observe.http import address
from cairn.observe.log import setup_logging
from cairn.observe.trace import setup_tracing
from cairn.serve.indexer.app import make_app
from cairn.serve.indexer.parts import Parts
from cairn.serve.indexer.rpc import make_server
from cairn.serve.process import (
    SWITCH_S,
    Server,
    ended_by_signals,
    listen,
    loop_factory,
    settings,
    until_begun,
)


class Addresses(NamedTuple):
    """Where the service listens; rpc: None without gRPC."""

    http: str
    rpc: str | None


def run(config: Config, started: Callable[[Addresses], None]) -> None:
    """Serves until SIGTERM or SIGINT; `started` is called once it listens. From a process's main thread.

    Where an etcd is named, its instances are followed too, as they come and go. Raises ConfigError, InputError or
    ClusterError, in one line, for what cannot be served so. At the end running requests have half of
    `index.shutdown_s`; a process that is still there after all of it ends itself.
    """
    index = config.index
    token = None if index.token is None else index.token.get_secret_value()
    check_exposure(index.host, token)
    setup_logging(index.log_level, config.observe.log_format)
    setup_tracing(config.observe, "cairn-index")
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(index, config.cluster, token, started))


async def _serve(config: Index, cluster: Cluster, token: str | None, started: Callable[[Addresses], None]) -> None:
    listening = listen(config.host, config.http_port)
    parts = Parts(config)
    try:
        rpc = port = None
        if config.rpc_port is not None:
            tokens = [] if token is None else [token]
            rpc, port = make_server(parts, tokens, address(config.host, config.rpc_port))
        async with AsyncExitStack() as stack:
            ended = stack.enter_context(ended_by_signals(config.shutdown_s))
            await asyncio.to_thread(parts.start, config)
            await stack.enter_async_context(_discovered(cluster, parts))
            http = Server(settings(make_app(parts, token), config.shutdown_s / 2))
            serving = asyncio.create_task(http.serve([listening]))
            if rpc is not None:
                await rpc.start()
            await until_begun(http, serving)
            ended.serving = True
            at = address(config.host, listening.getsockname()[1])
            started(Addresses(at, None if port is None else address(config.host, port)))
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
