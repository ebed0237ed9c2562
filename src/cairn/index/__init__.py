"""The prefix index and its eviction policies: pure data structures, without I/O."""

from cairn.index.base import EvictionPolicy
from cairn.index.lru import LRU
from cairn.index.prefix import PrefixIndex
from cairn.index.reservation import Reservation
from cairn.index.s3fifo import S3FIFO
from cairn.index.shared import IndexReader, Noted, shared_bytes
from cairn.index.tenure import Tenure

#: Policies by the name that a configuration gives them.
POLICIES: dict[str, type[EvictionPolicy]] = {policy.name: policy for policy in (LRU, S3FIFO, Tenure)}

#: The policy to use unless there is a reason for another.
DEFAULT_POLICY = Tenure.name

__all__ = [
    "DEFAULT_POLICY",
    "LRU",
    "POLICIES",
    "S3FIFO",
    "EvictionPolicy",
    "IndexReader",
    "Noted",
    "PrefixIndex",
    "Reservation",
    "Tenure",
    "shared_bytes",
]
