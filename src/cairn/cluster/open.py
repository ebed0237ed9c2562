"""From the configuration to a registry."""

from cairn.cluster.base import Registry
from cairn.cluster.memory import MemoryRegistry
from cairn.cluster.metrics import ClusterMetrics
from cairn.config.schema import Cluster
from cairn.errors import ClusterError


def open_registry(config: Cluster, metrics: ClusterMetrics | None = None) -> Registry:
    """etcd, if addresses are set, else this process's memory. Within an event loop; connects with the first call.

    Raises InputError for addresses or files that cannot be used, ClusterError without the extra `etcd`.
    """
    if not config.etcd_addr:
        return MemoryRegistry(metrics)
    try:
        from cairn.cluster.etcd import EtcdRegistry, EtcdSettings
    except ModuleNotFoundError as error:
        raise ClusterError(f"etcd needs {error.name}; pip install 'cairn-kv[etcd]' brings it") from None

    settings = EtcdSettings(
        endpoints=config.etcd_addr,
        username=config.username,
        password=config.password.get_secret_value() if config.password else None,
        ca=config.ca,
        cert=config.cert,
        key=config.key,
        timeout_s=config.timeout_s,
        attempt_s=config.timeout_s / 4,
    )
    return EtcdRegistry(settings, metrics)
