"""The peer tier: KV blocks in the DRAM of other hosts' nodes."""

from cairn.tier.peer.peers import Peers
from cairn.tier.peer.tier import Limits, PeerTier

__all__ = ["Limits", "PeerTier", "Peers"]
