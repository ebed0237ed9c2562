"""One process stores a prompt's KV in its GPU's memory, another retrieves it over NVLink: no host memory is touched.

python examples/cross_gpu_store_retrieve.py                # GPUs 0 and 1, or memory that stands in for them
CAIRN_LOG_LEVEL=DEBUG python examples/cross_gpu_store_retrieve.py examples/cross_gpu.yaml
"""

import multiprocessing
import signal
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cairn import CacheEngine, Config, KVGeometry, Namespace, load_config

CONFIG = Path(__file__).with_name("cross_gpu.yaml")
GEOMETRY = KVGeometry(layers=8, kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=16)
PAGES, PROMPT = 128, np.arange(1900) % 1777  # token ids
SLOTS = np.random.default_rng(0).permutation(PAGES)[:, None] * 16 + np.arange(16)  # where the paged cache has room


def config_of(path: Path, **settings: Any) -> Config:
    """The file, the environment (CAIRN_LOG_LEVEL and all), and what only this example knows."""
    return load_config(path, overrides=settings)


def run_node(path: Path, address: str, told: Connection) -> None:
    """The host's node, as `cairn node` runs it."""
    from cairn.engine.pool import open_pool, prepare
    from cairn.node.server import Node
    from cairn.observe.log import setup_logging

    config = config_of(path)
    setup_logging(config.engine.log_level)
    prepare(config)
    node = Node(config, address, open_pool)
    signal.signal(signal.SIGTERM, lambda *_: node.stop())
    told.send("listening")
    node.run()
    node.close(config.node.stop_timeout_s)


def run_engine(path: Path, address: str, number: int, told: Connection) -> None:
    """An inference process on GPU `number`: the first stores, the other retrieves."""
    gpus = torch.cuda.device_count() >= 2
    device = f"cuda:{number}" if gpus else "cpu"
    config = config_of(path, **{"storage.vram.device": device if gpus else "stand-in", "node.address": address})
    # One tensor a layer, [K and V, pages, tokens a page, heads, dim], filled as prefill would, or empty.
    generator = torch.Generator().manual_seed(1)
    filled = [torch.randn((2, PAGES, 16, 8, 128), generator=generator).bfloat16().to(device) for _ in range(8)]
    tensors = [torch.zeros_like(layer) if number else layer for layer in filled]
    slots = SLOTS.reshape(-1)[: len(PROMPT)]
    with CacheEngine(Namespace(model="my-model", revision="1", geometry=GEOMETRY), config) as engine:
        engine.register_kv_caches(tensors)
        if number == 0:
            stored = engine.store(PROMPT, slot_mapping=slots)
            told.send(f"{device}: stored {stored} of {len(PROMPT)} tokens; an unfinished block is left for later")
            told.recv()  # what is in VRAM goes with its process
            return
        first = engine.chain(PROMPT).key(0)
        where = {0: "in VRAM", 1: "elsewhere", -1: "nowhere"}[engine.contains(first)]
        loaded = engine.retrieve(PROMPT, slot_mapping=slots)
        pages = torch.from_numpy(SLOTS[: int(loaded.sum()) // 16, 0] // 16).to(device)
        right = all(torch.equal(a[:, pages], b[:, pages]) for a, b in zip(tensors, filled, strict=True))
        hits = engine.get_stats()["hit_tokens"]
        told.send(
            f"{device}: found it {where}, retrieved {int(loaded.sum())} tokens, hits by tier {hits}, right: {right}"
        )


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else CONFIG
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    with tempfile.TemporaryDirectory() as home:
        address = f"ipc://{home}/node.sock"
        try:
            for target, *arguments in ((run_node,), (run_engine, 0), (run_engine, 1)):
                ours, theirs = context.Pipe()
                processes.append(context.Process(target=target, args=(path, address, *arguments, theirs)))
                processes[-1].start()
                pipes.append(ours)
                theirs.close()  # so that a process that ends without a word is noticed
                print(ours.recv(), flush=True)
            pipes[1].send("go")
            processes[1].join(30)
        finally:
            for process in processes:
                process.terminate()
                process.join()


if __name__ == "__main__":
    main()
