"""Cairn keeps the KV cache of LLM inference alive beyond one GPU: prefill once, reuse anywhere.

The public names are imported when they are first used, so that `import cairn` and `cairn --help` stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cairn.config import Config, load_config
    from cairn.engine import CacheEngine, Stage, TaskResult, TaskStatus
    from cairn.errors import CairnError
    from cairn.kv import KeyChain, KVGeometry, Namespace

__version__ = "0.1.0"

_HOMES = {
    "CacheEngine": "cairn.engine",
    "CairnError": "cairn.errors",
    "Config": "cairn.config",
    "KVGeometry": "cairn.kv",
    "KeyChain": "cairn.kv",
    "Namespace": "cairn.kv",
    "Stage": "cairn.engine",
    "TaskResult": "cairn.engine",
    "TaskStatus": "cairn.engine",
    "load_config": "cairn.config",
}

__all__ = [
    "CacheEngine",
    "CairnError",
    "Config",
    "KVGeometry",
    "KeyChain",
    "Namespace",
    "Stage",
    "TaskResult",
    "TaskStatus",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cairn' has no attribute {name!r}")
