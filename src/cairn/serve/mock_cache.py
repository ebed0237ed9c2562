"""The cache behind a mock engine. It is a real `CacheEngine`: what it finds, moves and misses is Cairn's own doing.
Only the KV is noise, and the time that computing it would take is made up.
"""

import threading
from typing import Final

import numpy as np

from cairn.config import Config
from cairn.engine import CacheEngine
from cairn.kv import KVGeometry, Namespace
from cairn.observe.prometheus import exposition

#: Of the model that is made up: 2 KiB of KV a token.
_LAYERS, _HEADS, _DIM = 4, 2, 64
#: Tokens of the longest prompt; of a longer one the rest is not cached.
_ROOM: Final = 1 << 14
_TOKEN_BYTES: Final = 4


class MockCache:
    """Thread-safe: one prompt at a time, as on one device. `close` when done."""

    def __init__(self, model: str, config: Config) -> None:
        """Raises CairnError where the configuration's tiers cannot be opened."""
        block = config.engine.block_tokens
        geometry = KVGeometry(layers=_LAYERS, kv_heads=_HEADS, head_dim=_DIM, dtype="float16", block_tokens=block)
        self._engine = CacheEngine(Namespace(model=model, revision="mock", geometry=geometry), config)
        noise = np.random.default_rng(0).random((2, _ROOM // block, block, _HEADS, _DIM), np.float32)
        self._engine.register_kv_caches([noise.astype(np.float16) for _ in range(_LAYERS)])
        self._lock = threading.Lock()

    def prefill(self, text: str) -> int:
        """Loads what is held of a prompt and stores the rest; returns how many tokens had to be computed."""
        data = text.encode()
        tokens = np.frombuffer(data[: len(data) // _TOKEN_BYTES * _TOKEN_BYTES], "<u4")[:_ROOM]
        slots = np.arange(len(tokens))
        with self._lock:
            loaded = int(self._engine.retrieve(tokens, slot_mapping=slots).sum())
            self._engine.store(tokens, slot_mapping=slots)
        return len(data) // _TOKEN_BYTES - loaded

    def exposition(self) -> bytes:
        """Cairn's figures, as an engine's /metrics has them."""
        return exposition(self._engine.metrics)

    def close(self) -> None:
        self._engine.close()
