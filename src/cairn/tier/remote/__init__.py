"""Remote tiers: KV blocks packed into objects, in a store that outlives hosts."""

from cairn.tier.remote.base import Get, ObjectStore, Put
from cairn.tier.remote.tier import Limits, RemoteTier, open_remote
from cairn.tier.remote.urls import open_store

__all__ = ["Get", "Limits", "ObjectStore", "Put", "RemoteTier", "open_remote", "open_store"]
