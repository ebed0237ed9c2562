"""Draining: an instance gets nothing new from any replica of the service, for as long as this incarnation is there."""

from cairn.cluster.base import Check, Delete, Put, Registry
from cairn.cluster.keys import Keys
from cairn.cluster.values import Drain, Instance, decode, encode
from cairn.errors import InputError


async def drain(registry: Registry, keys: Keys, name: str) -> None:
    """Tells everybody. It outlives a lease that is lost, and goes when the instance leaves in order (`left`).

    Raises InputError for an instance that is not there, ClusterError if the registry does not answer.
    """
    while True:
        entry = await registry.get(keys.instance(name))
        instance = decode(entry, Instance) if entry else None
        if entry is None or not isinstance(instance, Instance):
            raise InputError(f"instance {name[:100]!r}: is not there; `cairn cluster list` shows who is")
        put = Put(keys.instance(name, "drain"), _drain_of(instance.incarnation))
        outcome = await registry.transact([Check(entry.key, modified=entry.modified)], [put])
        if outcome.applied:
            return


async def undrain(registry: Registry, keys: Keys, name: str) -> None:
    """Takes it back; one that was not drained is no error. Raises as `drain`."""
    if await registry.get(keys.instance(name)) is None:
        raise InputError(f"instance {name[:100]!r}: is not there; `cairn cluster list` shows who is")
    await registry.delete(keys.instance(name, "drain"))


async def left(registry: Registry, keys: Keys, name: str, incarnation: str) -> None:
    """An incarnation is gone for good, and so is what was told of it. Raises ClusterError if nobody answers."""
    key = keys.instance(name, "drain")
    await registry.transact([Check(key, value=_drain_of(incarnation))], [Delete(key)])


def _drain_of(incarnation: str) -> bytes:
    return encode(Drain(incarnation=incarnation))
