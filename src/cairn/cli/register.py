"""`cairn register`: an engine that knows nothing of the cluster, made known to it."""

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from cairn.cli.cluster import ConfigFile, Etcd, Namespace, Settings, cluster_config

if TYPE_CHECKING:
    from cairn.cluster import Instance
    from cairn.config.schema import Cluster


def register(
    name: Annotated[str, typer.Option(help="The instance's name, one of its own in the cluster.")],
    http: Annotated[str, typer.Option(help="Where its OpenAI API is, as others reach it: http://10.0.0.1:8000.")],
    role: Annotated[str, typer.Option(help="DEFAULT, PREFILL, DECODE or MIX.")] = "DEFAULT",
    events: Annotated[str | None, typer.Option(help="Where it publishes KV events, as tcp://10.0.0.1:5557.")] = None,
    replay: Annotated[str | None, typer.Option(help="Where it replays them, as tcp://10.0.0.1:5558.")] = None,
    ranks: Annotated[int, typer.Option(min=1, max=1024, help="Data-parallel ranks; ports count up from rank 0's.")] = 1,
    model: Annotated[str, typer.Option(help="Model name; asked of the engine if left out.")] = "",
    block_tokens: Annotated[int, typer.Option(min=0, help="Tokens of a KV block; 0: asked of the engine.")] = 0,
    capability: Annotated[list[str], typer.Option(help="What it can do beyond that; repeatable.")] = [],  # noqa: B006
    token: Annotated[
        str | None, typer.Option(envvar="CAIRN_ENGINE_TOKEN", help="The engine's API key; better by the variable.")
    ] = None,
    period: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between two looks.")] = 1.0,
    etcd_addr: Etcd = None,
    namespace: Namespace = None,
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006 (typer copies it)
) -> None:
    """Keep an engine registered in etcd while it answers, with its load.

    Stands beside an engine such as `vllm serve`, looks at its /health and /metrics, and deregisters it when it dies.

    \b
    Example:
      cairn register --name a --http http://10.0.0.1:8000 --events tcp://10.0.0.1:5557 --etcd-addr 10.0.0.9:2379
    """
    import asyncio
    import secrets

    from cairn.cluster import Events, Instance, Role
    from cairn.cluster.registrar import rank_endpoints
    from cairn.errors import InputError

    cluster = cluster_config(etcd_addr, namespace, config, settings)
    if role not in list(Role):
        raise InputError(f"{role}: no role; must be one of {', '.join(Role)}")
    if replay and not events:
        raise InputError("--replay comes with --events only; name where the events are published")
    replays = rank_endpoints(replay, ranks) if replay else [None] * ranks
    endpoints = rank_endpoints(events, ranks) if events else []
    instance = Instance(
        name=name,
        incarnation=secrets.token_hex(8),
        http=http,
        role=Role(role),
        model=model,
        events=tuple(Events(endpoint=endpoint, replay=replays[i], rank=i) for i, endpoint in enumerate(endpoints)),
        block_tokens=block_tokens,
        capabilities=tuple(capability),
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_register(cluster, instance, period, token))


async def _register(cluster: "Cluster", instance: "Instance", period: float, token: str | None) -> None:
    import asyncio
    import signal

    from cairn.cluster import Keys, open_registry
    from cairn.cluster.registrar import Registrar

    def tell(now: "Instance | None") -> None:
        what = f"registered as {now.incarnation}" if now else "gone"
        typer.echo(f"{instance.name}: {what}")

    async with open_registry(cluster) as registry:
        registrar = Registrar(
            registry,
            Keys(cluster.namespace),
            instance,
            lease_s=cluster.lease_s,
            period_s=period,
            token=token,
            on_change=tell,
        )
        task = asyncio.ensure_future(registrar.run())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task
