"""Values: geometry, layouts, block keys and namespaces. Knows nothing of what is above."""

from cairn.kv.geometry import KVGeometry
from cairn.kv.keys import KeyChain, Keys, as_tokens
from cairn.kv.layout import CANONICAL, Layout, Part
from cairn.kv.namespace import Namespace

__all__ = ["CANONICAL", "KVGeometry", "KeyChain", "Keys", "Layout", "Namespace", "Part", "as_tokens"]
