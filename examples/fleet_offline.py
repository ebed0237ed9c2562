"""The fleet's index without a fleet: two made-up engines tell of their blocks, and a router asks who holds what.

python examples/fleet_offline.py      # no GPU, no model, no network but loopback
"""

import asyncio
import socket

import msgspec
import numpy as np

from cairn.fleet import FleetIndex, Source, Speculation, Tier, score
from cairn.fleet.instances import Instance
from cairn.fleet.publisher import Publisher
from cairn.fleet.subscriber import Subscriber

BLOCK = 16
system_prompt = np.arange(256)  # token ids that both engines have seen
question = np.arange(1000, 1064)  # and what only one has seen after it


def batch(tokens: np.ndarray, medium: str) -> bytes:
    """What vLLM publishes when it has stored the blocks of a prompt: [time, events, data-parallel rank]."""
    blocks = tokens.reshape(-1, BLOCK)
    event = {
        "type": "BlockStored",
        "block_hashes": [hash(tokens[: BLOCK * (i + 1)].tobytes()) & (1 << 64) - 1 for i in range(len(blocks))],
        "parent_block_hash": None,
        "token_ids": tokens.tolist(),
        "block_size": BLOCK,
        "lora_id": None,
        "medium": medium,
        "lora_name": None,
    }
    return msgspec.msgpack.encode([0.0, [event], 0])


def free_endpoint() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{found.getsockname()[1]}"


async def main() -> None:
    index, speculation = FleetIndex(), Speculation(seconds=2.0)
    engines = {name: (free_endpoint(), free_endpoint()) for name in ("a", "b")}
    sources = [Source(name, 0) for name in engines]
    prompt = np.concatenate([system_prompt, question])
    with Publisher(*engines["a"]) as a, Publisher(*engines["b"]) as b:
        a.publish(batch(prompt, "GPU"))
        b.publish(batch(system_prompt, "CPU"))
        async with asyncio.timeout(30), Subscriber(index, [Instance(name, *at) for name, at in engines.items()]):
            while sum(index.held().values()) < (len(prompt) + len(system_prompt)) // BLOCK:
                await asyncio.sleep(0.01)
            for source, one in score(index, prompt, sources).items():
                held = {tier.name: count for tier, count in one.tokens.items() if count}
                print(f"{source.instance}: score {one.score:.0f} of {len(prompt)}, holds {held}")

            # A prompt that nobody holds goes to b; until b's events tell of it, it counts as held there.
            new = np.arange(5000, 5128)
            speculation.routed(Source("b", 0), index.hashed(new))
            found = score(index, new, sources, speculation=speculation)
            print(f"just sent to b: {found[Source('b', 0)].tokens[Tier.VRAM]} tokens count as held there")

            a.publish(msgspec.msgpack.encode([0.0, [{"type": "AllBlocksCleared"}], 0]))
            while Source("a", 0) in index.held():
                await asyncio.sleep(0.01)
            best = max(score(index, prompt, sources).items(), key=lambda found: found[1].score)
            print(f"a has cleared its cache: now {best[0].instance} is best, with {best[1].score:.0f}")


if __name__ == "__main__":
    asyncio.run(main())
