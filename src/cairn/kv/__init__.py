"""Values: geometry, layouts, block keys and namespaces. Knows nothing of what is above."""

from cairn.kv.geometry import KVGeometry
from cairn.kv.keys import KeyChain, Keys, as_tokens
from cairn.kv.namespace import Namespace

__all__ = ["KVGeometry", "KeyChain", "Keys", "Namespace", "as_tokens"]
