"""A `CacheEngine` inside one's own inference code: load what is known of a prompt, store what is new.

python examples/embed_engine.py      # twice: the second time the prompt comes from the disk
"""

import numpy as np

from cairn import CacheEngine, KVGeometry, Namespace, load_config

geometry = KVGeometry(layers=4, kv_heads=2, head_dim=64, dtype="float16", block_tokens=16)
config = load_config(overrides={"storage.cpu.size": "256MiB", "storage.disk.path": "cairn-cache"})
prompt = np.arange(1000) % 977  # token ids, as an array
slots = np.random.default_rng(0).permutation(64 * 16)[: len(prompt)]  # where each token stands in the paged cache
# One tensor a layer, [K and V, pages, tokens a page, heads, dim], as vLLM's attention backends have them.
filled = [np.random.default_rng(layer).random((2, 64, 16, 2, 64)).astype(np.float16) for layer in range(4)]
empty = [np.zeros_like(layer) for layer in filled]

with CacheEngine(Namespace(model="my-model", revision="1", geometry=geometry), config) as engine:
    loaded = engine.retrieve(prompt, kvcaches=empty, slot_mapping=slots)
    print("loaded", int(loaded.sum()), "of", len(prompt), "tokens; an unfinished block is left to be computed")
    print("stored", engine.store(prompt, kvcaches=filled, slot_mapping=slots), "tokens that DRAM did not hold")
    print("hits by tier:", engine.get_stats()["hit_tokens"])
