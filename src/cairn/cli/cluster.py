"""`cairn cluster`: who is there, and what all replicas of the service are told."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cairn.cli.output import help_if_alone, show

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cairn.cluster import Keys, Member, Registry
    from cairn.cluster.directory import Event
    from cairn.config.schema import Cluster

app = typer.Typer(
    callback=help_if_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Show the instances, replicas and nodes that are registered in etcd, and tell all replicas what holds.",
)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file; CAIRN_CONFIG names it if left out.", metavar="FILE")
]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one key; repeatable.")]
Etcd = Annotated[str | None, typer.Option(help="Members of etcd, as host:port, with commas between.", metavar="ADDR")]
Namespace = Annotated[str | None, typer.Option(help="First part of every key.", metavar="NAME")]
_Json = Annotated[bool, typer.Option("--json", help="For machines.")]
_Slo = Annotated[float | None, typer.Option(help="Seconds; left out: each replica's own.")]


@app.command("list")
def list_members(
    etcd_addr: Etcd = None,
    namespace: Namespace = None,
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006 (typer copies it)
    as_json: _Json = False,
) -> None:
    """List the instances with their last reports, the service's replicas and which of them leads, the SLO that they
    share, and the nodes that answer peers.

    \b
    Example:
      cairn cluster list --etcd-addr 127.0.0.1:2379
    """
    import asyncio

    cluster = cluster_config(etcd_addr, namespace, config, settings)
    show(asyncio.run(_listing(cluster)), title="cairn cluster list", as_json=as_json)


@app.command()
def watch(
    etcd_addr: Etcd = None,
    namespace: Namespace = None,
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006 (typer copies it)
    seconds: Annotated[float, typer.Option(min=0, help="How long at most.")] = 1e9,
    reports: Annotated[bool, typer.Option("--reports", help="Show load reports, too.")] = False,
    as_json: _Json = False,
) -> None:
    """Show who comes, goes and changes, a line each, until interrupted.

    \b
    Example:
      cairn cluster watch --etcd-addr 127.0.0.1:2379 --reports
    """
    import asyncio

    cluster = cluster_config(etcd_addr, namespace, config, settings)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_watch(cluster, seconds, reports, as_json))


@app.command()
def drain(
    name: Annotated[str, typer.Argument(help="Of an instance.")],
    etcd_addr: Etcd = None,
    namespace: Namespace = None,
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006 (typer copies it)
    undo: Annotated[bool, typer.Option("--undo", help="Have requests sent there again.")] = False,
) -> None:
    """Have no replica of the service send anything new to an instance, until it leaves or `--undo`.

    \b
    Example:
      cairn cluster drain a --etcd-addr 127.0.0.1:2379
    """
    from cairn.cluster import drain, undrain

    tell = undrain if undo else drain
    _told(cluster_config(etcd_addr, namespace, config, settings), lambda registry, keys: tell(registry, keys, name))


@app.command()
def slo(
    ttft_s: _Slo = None,
    tbt_s: _Slo = None,
    etcd_addr: Etcd = None,
    namespace: Namespace = None,
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006 (typer copies it)
) -> None:
    """Set the SLO of all replicas of the service, from now on; without options each has its own again.

    \b
    Example:
      cairn cluster slo --ttft-s 1 --tbt-s 0.05 --etcd-addr 127.0.0.1:2379
    """
    from cairn.cluster import put_setting
    from cairn.serve.gateway.agreed import SLO, SharedSlo

    given = {"ttft_s": ttft_s, "tbt_s": tbt_s}
    ruled = [f"serve.slo.{key}={value}" for key, value in given.items() if value is not None]  # as a replica's own
    cluster, shared = cluster_config(etcd_addr, namespace, config, [*settings, *ruled]), SharedSlo(**given)
    _told(cluster, lambda registry, keys: put_setting(registry, keys, SLO, shared))


def cluster_config(etcd_addr: str | None, namespace: str | None, config: Path | None, settings: list[str]) -> "Cluster":
    """The section `cluster` with the options in force. Raises ConfigError without an address of etcd."""
    from cairn.config import load_config, parse_assignment
    from cairn.errors import ConfigError

    given = {"cluster.etcd_addr": etcd_addr, "cluster.namespace": namespace}
    overrides = dict(map(parse_assignment, settings)) | {key: value for key, value in given.items() if value}
    cluster = load_config(config, overrides=overrides).cluster
    if not cluster.etcd_addr:
        raise ConfigError("cluster.etcd_addr is empty, so nobody else can be seen; name etcd with --etcd-addr")
    return cluster


def _told(cluster: "Cluster", tell: "Callable[[Registry, Keys], Awaitable[None]]") -> None:
    import asyncio

    from cairn.cluster import Keys, open_registry

    async def told() -> None:
        async with open_registry(cluster) as registry:
            await tell(registry, Keys(cluster.namespace))

    asyncio.run(told())


async def _listing(cluster: "Cluster") -> dict[str, Any]:
    import msgspec

    from cairn.cluster import Directory, Election, HostNodes, Keys, Replicas, Shared, open_registry
    from cairn.serve.gateway.agreed import ELECTION, SLO, SharedSlo

    keys = Keys(cluster.namespace)
    async with open_registry(cluster) as registry:
        await registry.range(keys.instances)  # so that what is wrong ends in one line
        async with (
            Directory(registry, keys) as directory,
            Replicas(registry, keys) as replicas,
            HostNodes(registry, keys) as nodes,
            Shared(registry, keys, SLO, SharedSlo, SharedSlo()) as slo,
        ):
            if not all([await one.wait(cluster.timeout_s) for one in (directory, replicas, nodes, slo)]):
                _not_in_time(cluster)
            return {
                "instances": {name: _figures(member) for name, member in sorted(directory.members.items())},
                "replicas": {name: _plain(one) for name, one in sorted(replicas.values.items())},
                "nodes": {name: _plain(one) for name, one in sorted(nodes.values.items())},
                "leader": await Election(registry, keys.election(ELECTION), "", cluster.lease_s).leader(),
                "slo": msgspec.to_builtins(slo.value),
            }


async def _watch(cluster: "Cluster", seconds: float, reports: bool, as_json: bool) -> None:
    import asyncio

    from cairn.cluster import Directory, Keys, open_registry

    keys = Keys(cluster.namespace)
    async with open_registry(cluster) as registry:
        await registry.range(keys.instances)
        async with Directory(registry, keys) as directory:
            if not await directory.wait(cluster.timeout_s):
                _not_in_time(cluster)
            directory.listen(lambda event: _tell(event, reports, as_json))
            await asyncio.sleep(seconds)


def _tell(event: "Event", reports: bool, as_json: bool) -> None:
    from cairn.cluster import Changed

    instance = event.member.instance
    if isinstance(event, Changed) and instance == event.before.instance and not reports:
        return
    what = type(event).__name__.lower()
    if as_json:
        typer.echo(json.dumps({"event": what, "name": instance.name} | _figures(event.member)))
        return
    load = event.member.load
    busy = f", {load.running} running, {load.waiting} waiting, KV {load.kv_usage:.0%}" if load else ""
    typer.echo(f"{what:8}{instance.name} ({instance.role}, {instance.http}, {instance.incarnation}){busy}")


def _figures(member: "Member") -> dict[str, Any]:
    return {
        "instance": _plain(member.instance),
        "load": _plain(member.load) if member.load else None,
        "cache": _plain(member.cache) if member.cache else None,
        "draining": member.drain is not None,
    }


def _plain(value: Any) -> Mapping[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(value)
    plain.pop("v", None)
    return plain


def _not_in_time(cluster: "Cluster") -> None:
    from cairn.errors import ClusterError

    raise ClusterError(f"etcd has not answered in {cluster.timeout_s:g} s")
