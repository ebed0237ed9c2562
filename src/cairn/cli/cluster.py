"""`cairn cluster`: who is there."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cairn.cli.output import help_if_alone, show

if TYPE_CHECKING:
    from cairn.cluster import Member
    from cairn.cluster.directory import Event
    from cairn.config.schema import Cluster

app = typer.Typer(
    callback=help_if_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Show the instances, replicas and nodes that are registered in etcd.",
)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file; CAIRN_CONFIG names it if left out.", metavar="FILE")
]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one key; repeatable.")]
Etcd = Annotated[str | None, typer.Option(help="Members of etcd, as host:port, with commas between.", metavar="ADDR")]
Namespace = Annotated[str | None, typer.Option(help="First part of every key.", metavar="NAME")]
_Json = Annotated[bool, typer.Option("--json", help="For machines.")]


@app.command("list")
def list_members(
    etcd_addr: Etcd = None,
    namespace: Namespace = None,
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006 (typer copies it)
    as_json: _Json = False,
) -> None:
    """List the instances with their last reports, the service's replicas, and the nodes that answer peers.

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


async def _listing(cluster: "Cluster") -> dict[str, Any]:
    from cairn.cluster import Directory, HostNodes, Keys, Replicas, open_registry

    keys = Keys(cluster.namespace)
    async with open_registry(cluster) as registry:
        await registry.range(keys.instances)  # so that what is wrong ends in one line
        async with (
            Directory(registry, keys) as directory,
            Replicas(registry, keys) as replicas,
            HostNodes(registry, keys) as nodes,
        ):
            if not all([await one.wait(cluster.timeout_s) for one in (directory, replicas, nodes)]):
                _not_in_time(cluster)
            return {
                "instances": {name: _figures(member) for name, member in sorted(directory.members.items())},
                "replicas": {name: _plain(one) for name, one in sorted(replicas.values.items())},
                "nodes": {name: _plain(one) for name, one in sorted(nodes.values.items())},
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
    }


def _plain(value: Any) -> Mapping[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(value)
    plain.pop("v", None)
    return plain


def _not_in_time(cluster: "Cluster") -> None:
    from cairn.errors import ClusterError

    raise ClusterError(f"etcd has not answered in {cluster.timeout_s:g} s")
