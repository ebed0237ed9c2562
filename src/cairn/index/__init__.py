"""The prefix index and its eviction policies: pure data structures, without I/O."""

from cairn.index.base import EvictionPolicy
from cairn.index.lru import LRU
from cairn.index.prefix import PrefixIndex

__all__ = ["LRU", "EvictionPolicy", "PrefixIndex"]
