"""The prefix index and its eviction policies: pure data structures, without I/O."""

from cairn.index.base import EvictionPolicy
from cairn.index.lru import LRU
from cairn.index.prefix import PrefixIndex

#: Policies by the name that a configuration gives them.
POLICIES: dict[str, type[EvictionPolicy]] = {LRU.name: LRU}

__all__ = ["LRU", "POLICIES", "EvictionPolicy", "PrefixIndex"]
