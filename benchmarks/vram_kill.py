"""What becomes of a reader whose peer dies while its VRAM is read: right bytes or a miss, in time, and no CUDA error.

    PYTHONPATH=src python3 benchmarks/vram_kill.py --out vram_kill.json              # one CUDA device or two, 60 s
    PYTHONPATH=src python3 benchmarks/vram_kill.py --stand-in --out vram_kill.json   # the same code without a GPU

A giver stores prompts in its VRAM, one after the other; a taker retrieves them without pause, out of the giver's VRAM
and, what was written behind, out of the node's DRAM. After a random time the giver is killed (SIGKILL), and another one
takes its place. Every retrieve is timed, and what it says it has loaded is compared on the device, after every twelfth.
The taker's process is the same from the first kill to the last, so a context that CUDA has given up is seen.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vram_pool import G, Place, children, node_process, settings

from cairn.engine import CacheEngine
from cairn.kv import Namespace

PAUSES_S = 0.02, 0.6
LIMIT_S = 2.0
REPEATS = 12


def prompt(engine: CacheEngine, seed: int, blocks: int) -> Any:
    return engine.chain(np.random.default_rng(seed).integers(0, 1 << 17, blocks * G.block_tokens))


def opened(address: str, place: Place, vram_blocks: int) -> tuple[CacheEngine, Any, Any, Any, Any]:
    """(engine, tensors, their description, slots of a prompt in them, its pages)"""
    if not place.stand_in:
        torch.cuda.set_device(place.device)
    engine = CacheEngine(Namespace(model="bench", geometry=G), settings(place, vram_blocks), node=address)
    tensors = place.empty_cache("cross_layer")
    kv = engine.register_kv_caches(tensors, "cross_layer")
    pages = np.random.default_rng(0).permutation(place.blocks)
    slots = (pages[:, None] * G.block_tokens + np.arange(G.block_tokens)).reshape(-1)
    return engine, tensors, kv, slots, torch.from_numpy(pages).to(place.device)


def giver(address: str, place: Place, first: int, latest: Any, taken: Any, pipe: Any) -> None:
    """Stores prompts until it is killed, one ahead of the taker. latest: the last one that is stored, by its number."""
    engine, tensors, kv, slots, pages = opened(address, place, 2 * place.blocks + 8)
    for seed in range(first, first + 1_000_000):
        place.fill(tensors, "cross_layer", seed, pages)
        place.synchronize()
        if engine.store(prompt(engine, seed, place.blocks), None, kv, slots):
            latest.value = seed
            if seed == first:
                pipe.send("stored")
        while taken.value < seed:
            time.sleep(0.0005)


def taker(address: str, place: Place, latest: Any, taken: Any, over: Any, pipe: Any) -> None:
    """Retrieves the latest prompt until `over`, then tells what was seen. taken: the number of the one it is at."""
    engine, tensors, kv, slots, pages = opened(address, place, 8)
    seen: dict[str, Any] = {"calls": 0, "whole": 0, "partial": 0, "misses": 0, "wrong": 0, "slowest_s": 0.0}
    pipe.send("ready")
    while not over.is_set():
        seed = taken.value = latest.value
        chain = prompt(engine, seed, place.blocks)
        for tensor in tensors:
            tensor.fill_(0x5A5A)
        for _ in range(REPEATS):
            place.synchronize()
            began = time.perf_counter()
            mask = engine.retrieve(chain, None, kv, slots)
            seen["slowest_s"] = max(seen["slowest_s"], time.perf_counter() - began)
            blocks = int(mask.sum()) // G.block_tokens
            seen["calls"] += 1
            seen["whole" if blocks == place.blocks else "partial" if blocks else "misses"] += 1
        seen["wrong"] += not right(place, tensors, seed, pages, blocks)
    stats: Any = engine.get_stats()
    pipe.send(seen | {"hit_tokens": stats["hit_tokens"], "miss_tokens": stats["miss_tokens"]})


def right(place: Place, tensors: Any, seed: int, pages: Any, blocks: int) -> bool:
    """Whether the prompt's first blocks are what was stored."""
    loaded = pages[:blocks]
    for layer in range(G.layers):
        found = place.layer(tensors, "cross_layer", layer)[:, loaded]
        if not bool(torch.equal(found, place.expected(seed, layer, pages)[:, loaded])):
            return False
    return True


def measure(places: tuple[Place, Place], seconds: float, seed: int) -> dict[str, Any]:
    """Kills givers for so many seconds."""
    chance, began, kills = random.Random(seed), time.monotonic(), 0
    context = multiprocessing.get_context("spawn")
    latest, taken, over = context.Value("q", 0), context.Value("q", 0), context.Event()
    moved = places[0].blocks * G.block_bytes
    with tempfile.TemporaryDirectory(prefix="cairn-") as home, children() as start:
        address = f"ipc://{home}/node.sock"
        start(node_process, address, 2 * moved).answer()
        reader = start(taker, address, places[1], latest, taken, over)
        reader.answer()
        while time.monotonic() - began < seconds:
            writer = start(giver, address, places[0], kills * 1_000_000 + 1, latest, taken)
            writer.answer()
            time.sleep(chance.uniform(*PAUSES_S))  # the moment of the kill is what is drawn
            writer.process.kill()
            writer.process.join()
            kills += 1
            print(f"killed {kills} after {time.monotonic() - began:.0f} s", flush=True)
        over.set()
        found: dict[str, Any] = reader.answer()
    found |= {"kills": kills, "bytes": moved, "devices": [place.name for place in places]}
    found["meets_bars"] = not found["wrong"] and found["slowest_s"] <= LIMIT_S and found["whole"] > 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stand-in", action="store_true", help="host memory in the place of VRAM")
    parser.add_argument("--seconds", type=float, default=75, help="no giver is started later")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    blocks = 8 if args.stand_in else 1024
    second = 0 if args.stand_in else torch.cuda.device_count() - 1
    places = Place(0, args.stand_in, blocks), Place(min(second, 1), args.stand_in, blocks)
    result = measure(places, args.seconds, args.seed)
    result |= {"date": time.strftime("%Y-%m-%d"), "seed": args.seed}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
