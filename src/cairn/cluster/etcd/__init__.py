"""The registry on etcd v3: a thin client on grpcio. Needs the extra `etcd`."""

from cairn.cluster.etcd.registry import EtcdRegistry
from cairn.cluster.etcd.settings import EtcdSettings

__all__ = ["EtcdRegistry", "EtcdSettings"]
