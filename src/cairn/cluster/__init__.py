"""Who is there: a registry with leases (etcd, or this process's memory), and the instances, replicas, settings in it.

It knows nothing of KV.
"""

from cairn.cluster.base import Registry
from cairn.cluster.directory import Changed, Directory, Joined, Left, Member
from cairn.cluster.draining import drain, undrain
from cairn.cluster.election import Election, Leadership
from cairn.cluster.keys import Keys
from cairn.cluster.listed import HostNodes, Replicas
from cairn.cluster.memory import MemoryRegistry
from cairn.cluster.open import open_registry
from cairn.cluster.registration import Registration
from cairn.cluster.shared import Shared, put_setting
from cairn.cluster.values import CacheState, Drain, Events, HostNode, Instance, Load, Replica, TierState
from cairn.plan.role import Role

__all__ = [
    "CacheState",
    "Changed",
    "Directory",
    "Drain",
    "Election",
    "Events",
    "HostNode",
    "HostNodes",
    "Instance",
    "Joined",
    "Keys",
    "Leadership",
    "Left",
    "Load",
    "Member",
    "MemoryRegistry",
    "Registration",
    "Registry",
    "Replica",
    "Replicas",
    "Role",
    "Shared",
    "TierState",
    "drain",
    "open_registry",
    "put_setting",
    "undrain",
]
