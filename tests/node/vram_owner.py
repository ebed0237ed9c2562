"""An engine in a process of its own that stores prompts in its VRAM, and then does as it is told on its input."""

import sys

from cairn.config import load_config
from cairn.engine import CacheEngine
from tests.engine.pages import SLOT, namespace, prompt, retrieved, stored


def vram_engine(address: str, blocks: int, **settings: object) -> CacheEngine:
    overrides = {
        "storage.vram.size": blocks * SLOT,
        "storage.vram.device": "stand-in",
        "engine.planner": False,
        "engine.copy_threads": 1,
        **settings,
    }
    return CacheEngine(namespace(), load_config(environ={}, overrides=overrides), node=address)


def main() -> None:
    """Words: `store SEED LENGTH`, `load SEED LENGTH`; each is answered with how many tokens it was."""
    engine = vram_engine(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        word, seed, length = line.split()
        done = {"store": stored, "load": retrieved}[word](engine, prompt(int(seed), int(length)))
        assert engine.flush(30)
        sys.stdout.write(f"{done}\n")
        sys.stdout.flush()
    engine.close()


if __name__ == "__main__":
    main()
