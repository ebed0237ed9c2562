"""Where everything stands in the registry: one folder a namespace, so that clusters can share an etcd."""

from typing import Final, NamedTuple

from cairn.errors import InputError

_MAX_NAME: Final = 200


class Keys(NamedTuple):
    """Keys under `/namespace/`. Names have no slash, as slashes separate; a bad one raises InputError."""

    namespace: str = "cairn"

    @property
    def instances(self) -> str:
        return self._folder("instances")

    @property
    def replicas(self) -> str:
        return self._folder("replicas")

    @property
    def nodes(self) -> str:
        return self._folder("nodes")

    @property
    def settings(self) -> str:
        return self._folder("settings")

    def instance(self, name: str, part: str = "instance") -> str:
        """part: instance, load, cache or drain."""
        return f"{self.instances}{checked_name(name)}/{part}"

    def replica(self, name: str) -> str:
        return self.replicas + checked_name(name)

    def node(self, name: str) -> str:
        return self.nodes + checked_name(name)

    def setting(self, name: str) -> str:
        return self.settings + checked_name(name)

    def election(self, name: str) -> str:
        """The folder of an election."""
        return self._folder(f"elections/{checked_name(name)}")

    def _folder(self, name: str) -> str:
        return f"/{checked_name(self.namespace)}/{name}/"


def checked_name(name: str) -> str:
    """The name. Raises InputError for one that cannot be part of a key."""
    if not 0 < len(name) <= _MAX_NAME or "/" in name or not name.isprintable():
        raise InputError(f"{name[:64]!r}: must be 1 to {_MAX_NAME} printable characters without a slash")
    return name
