"""The gateway as a process: from the configuration to what listens, and to an end that is bounded in time."""

import asyncio
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

from cairn.cluster import Directory, Keys, Registration, Registry, Replica, open_registry
from cairn.config.schema import Config
from cairn.errors import ConfigError
from cairn.fleet.discovery import Discovery
from cairn.observe.access import check_exposure
from cairn.observe.http import address
from cairn.observe.log import setup_logging
from cairn.observe.trace import setup_tracing
from cairn.plan.schedule import SCHEDULERS, SloAware, rehearse
from cairn.serve.dashboard import Board
from cairn.serve.gateway.admin import Admin
from cairn.serve.gateway.agreed import Agreed, SharedSlo
from cairn.serve.gateway.app import Gateway
from cairn.serve.gateway.backends import parse_backends, registered
from cairn.serve.gateway.dispatch import Dispatch
from cairn.serve.gateway.guesses import Guesses
from cairn.serve.gateway.members import Members
from cairn.serve.gateway.metrics import GatewayMetrics
from cairn.serve.gateway.prompts import FleetPrompts
from cairn.serve.gateway.relay import Relay
from cairn.serve.gateway.shown import ClusterShown
from cairn.serve.indexer.parts import Parts
from cairn.serve.indexer.rpc import make_server
from cairn.serve.process import SWITCH_S, Server, ended_by_signals, listen, loop_factory, settings, until_begun
from cairn.serve.tokenizers import ANY_MODEL

#: Seconds for which an idle client's connection is kept.
_KEEP_ALIVE_S = 75


class Addresses(NamedTuple):
    """Where the service listens; rpc: None without gRPC."""

    http: str
    rpc: str | None


def run(config: Config, started: Callable[[Addresses], None]) -> None:
    """Serves until SIGTERM or SIGINT; `started` is called once it listens. From a process's main thread.

    Raises ConfigError, InputError or ClusterError, in one line, for what cannot be served so. At the end running
    requests have half of `serve.shutdown_s`; a process that is still there after all of it ends itself.
    """
    _check(config)
    setup_logging(config.serve.log_level, config.observe.log_format)
    setup_tracing(config.observe, "cairn-serve")
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(config, started))


def _check(config: Config) -> None:
    serve = config.serve
    keys: list[str | None] = [key.get_secret_value() for key in serve.api_keys]
    for key in keys or [None]:
        check_exposure(serve.host, key, "CAIRN_SERVE__API_KEYS, or --api-key-file")
    if serve.backends and config.cluster.etcd_addr:
        raise ConfigError(
            "serve.backends and cluster.etcd_addr: name one; beside etcd, engines join by `cairn register`"
        )
    if not serve.backends and not config.cluster.etcd_addr:
        raise ConfigError("no engines: name serve.backends (--backend), or an etcd where they register (--etcd-addr)")
    parse_backends(serve.backends)  # what is wrong is told before anything is compiled


async def _serve(config: Config, started: Callable[[Addresses], None]) -> None:
    serve = config.serve
    listening = listen(serve.host, serve.http_server_port, "--http-server-port")
    at = address(serve.host, listening.getsockname()[1])
    models = dict(config.index.models)
    if serve.tokenizer_path is not None:
        models.setdefault(ANY_MODEL, serve.tokenizer_path)
    index = config.index.model_copy(update={"models": models})
    parts = Parts(index)
    prompts = FleetPrompts(parts)
    members = Members(serve, prompts.forget)
    try:
        async with AsyncExitStack() as stack:
            ended = stack.enter_context(ended_by_signals(serve.shutdown_s))
            await asyncio.to_thread(parts.start, index)
            await asyncio.to_thread(rehearse, SCHEDULERS[serve.policy]())
            await asyncio.to_thread(Guesses.rehearse)
            if serve.tokenizer_path is not None:
                await asyncio.to_thread(parts.tokenizers.text, ANY_MODEL, "loaded before anybody waits for it")
            rpc = port = None
            if serve.rpc_server_port is not None:
                keys = [key.get_secret_value() for key in serve.api_keys]
                rpc, port = make_server(parts, keys, address(serve.host, serve.rpc_server_port), "--rpc-server-port")
                await rpc.start()
            rpc_at = None if port is None else address(serve.host, port)
            registry = await stack.enter_async_context(_followed(config, members, parts))
            metrics = GatewayMetrics(members, (registry.metrics, *parts.metrics.collectors))
            dispatch = Dispatch(members, SCHEDULERS[serve.policy](), serve, metrics.shed.add)
            await stack.enter_async_context(_agreed(config, registry, dispatch, serve.name or at))
            shown = ClusterShown(
                serve.name or at,
                members,
                metrics.traffic,
                lambda: dispatch.waiting,
                parts.index.held,
                with_text=serve.show_prompts,
            )
            board = await stack.enter_async_context(Board(shown))
            admin = Admin(members, dispatch, registry, Keys(config.cluster.namespace))
            gateway = Gateway(Relay(members, dispatch, prompts, serve, metrics), admin, serve, metrics, board)
            http = Server(settings(gateway, serve.shutdown_s / 2, keep_alive_s=_KEEP_ALIVE_S))
            serving = asyncio.create_task(http.serve([listening]))
            await until_begun(http, serving)
            ended.serving = True
            await stack.enter_async_context(_announced(config, registry, at, rpc_at))
            started(Addresses(at, rpc_at))
            await ended.wait()
            http.should_exit = True
            await asyncio.gather(serving, *([rpc.stop(serve.shutdown_s / 2)] if rpc is not None else []))
    finally:
        listening.close()
        parts.close()


@asynccontextmanager
async def _followed(config: Config, members: Members, parts: Parts) -> AsyncIterator[Registry]:
    """The registry, with everything that follows its instances. Without an answer at the start there are none yet."""
    keys, serve = Keys(config.cluster.namespace), config.serve
    token = serve.backend_token.get_secret_value() if serve.backend_token else None
    instances = parse_backends(serve.backends)
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(open_registry(config.cluster))
        directory = await stack.enter_async_context(Directory(registry, keys))
        await stack.enter_async_context(Discovery(directory, parts.following))
        stack.enter_context(members.following(directory))
        await stack.enter_async_context(
            registered(registry, keys, instances, config.cluster.lease_s, serve.look_s, token)
        )
        await directory.wait(config.cluster.timeout_s)
        yield registry


def _agreed(config: Config, registry: Registry, dispatch: Dispatch, name: str) -> Agreed:
    scheduler, own = dispatch.scheduler, config.serve.slo

    def take(slo: SharedSlo) -> None:
        dispatch.slo = slo.over(own)

    mix = scheduler.sides.mix if isinstance(scheduler, SloAware) else None
    return Agreed(registry, config.cluster, name, mix, take)


@asynccontextmanager
async def _announced(config: Config, registry: Registry, http: str, rpc: str | None) -> AsyncIterator[None]:
    """Makes this replica known, where there is a cluster to know it."""
    if not config.cluster.etcd_addr:
        yield
        return
    name = config.serve.name or http
    replica = Replica(
        name=name,
        incarnation=secrets.token_hex(8),
        http=f"http://{http}",
        rpc=rpc or "",
        started=time.time(),
    )
    key = Keys(config.cluster.namespace).replica(name)
    async with Registration(registry, key, replica, config.cluster.lease_s):
        yield
