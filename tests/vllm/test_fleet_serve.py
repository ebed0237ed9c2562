"""Two `vllm serve` and the fleet's index: for any prompt it knows what each engine will hit, through load, an eviction
storm, and one engine's death and return.
"""

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.vllm.engine import prompts
from tests.vllm.pool import Pool
from tests.vllm.server import Server

pytest.importorskip("zmq")

from cairn.fleet import Event, FleetIndex, Source, Tier
from cairn.fleet.instances import Instance, Limits
from cairn.fleet.subscriber import Subscriber
from tests.fleet.peers import until

BLOCK, BLOCKS = 32, 96
#: Which of them share what is a matter of chance: both engines get prompts of both families, and some the same.
FAMILIES = prompts(60) + prompts(60, seed=1)
START_S = 240.0
IN_FLIGHT = 4


class Engine:
    """One server and its place in the fleet."""

    def __init__(self, name: str, model: Path, home: Path) -> None:
        home.mkdir()
        endpoint, replay = f"ipc://{home}/events", f"ipc://{home}/replay"
        events = '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "%s", "replay_endpoint": "%s"}'
        options = ["--kv-events-config", events % (endpoint, replay), "--enable-prompt-tokens-details"]
        options += ["--block-size", str(BLOCK), "--num-gpu-blocks-override", str(BLOCKS), "--max-model-len", "1024"]
        options += ["--max-num-seqs", str(IN_FLIGHT), "--disable-uvicorn-access-log"]
        self.server = Server(model, home, *options)
        self.instance = Instance(name, endpoint, replay)
        self.source = Source(name, 0)
        self.pool = Pool()

    async def ask(self, prompt: Sequence[int], tokens: int = 1) -> int:
        """How many tokens of the prompt the engine had cached."""
        reply = await asyncio.to_thread(self.server.complete, list(prompt), tokens)
        return int((reply["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0)

    async def ask_all(self, asked: Sequence[list[int]], chance: random.Random) -> None:
        """A few at a time. Some answers are long enough to fill blocks."""
        free = asyncio.Semaphore(IN_FLIGHT)

        async def one(prompt: list[int], tokens: int) -> None:
            async with free:
                await self.ask(prompt, tokens)

        await asyncio.gather(*(one(prompt, chance.choice([1, 1, 2, 8, 40])) for prompt in asked))


class Fleet:
    """The index beside the oracles, fed by the same events."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.index = FleetIndex()
        self.pools = {engine.source: engine.pool for engine in engines}
        self.compared = self.part = 0
        self._fences = random.Random("fences")

    def apply(self, source: Source, events: Sequence[Event]) -> None:
        self.index.apply(source, events)
        self.pools[source].apply(source, events)

    def drop(self, source: Source) -> None:
        self.index.drop(source)
        self.pools[source].drop(source)

    def held(self, engine: Engine, prompt: Sequence[int]) -> int:
        return self.index.match(prompt).of(engine.source)[Tier.VRAM]

    async def all_told(self, engine: Engine) -> None:
        """Batches come in order: once a new prompt's block is held, all that came before has been taken in."""
        fence = [self._fences.randrange(1000, 40000) for _ in range(BLOCK + 1)]
        await engine.ask(fence)
        await until(lambda: self.held(engine, fence) == BLOCK, "the events of the last question")

    async def compare(self, engine: Engine, asked: Sequence[list[int]]) -> None:
        """What the index says of each prompt is what the engine really finds of it."""
        for prompt in asked:
            await self.all_told(engine)
            most = (len(prompt) - 1) // BLOCK * BLOCK  # the last token is always computed
            told, real = self.held(engine, prompt), engine.pool.held(prompt, BLOCK)
            hit = await engine.ask(prompt)
            assert hit == min(real, most)
            assert told == real
            self.compared += 1
            self.part += 0 < hit < most


@pytest.fixture
def engines(tiny_texts: Path, tmp_path: Path) -> Iterator[list[Engine]]:
    with ExitStack() as stack:
        made = []
        for name in ("a", "b"):
            made.append(Engine(name, tiny_texts, tmp_path / name))
            stack.callback(made[-1].server.stop)
        for engine in made:
            engine.server.wait(time.monotonic() + START_S)
        yield made


def test_the_index_knows_what_the_engines_hit(engines: list[Engine]) -> None:
    asyncio.run(follow(*engines))


async def follow(a: Engine, b: Engine) -> None:
    fleet, chance = Fleet([a, b]), random.Random(7)
    limits = Limits(check_s=1.0, lost_s=START_S)
    async with Subscriber(fleet, [a.instance, b.instance], limits=limits) as subscriber:
        await asyncio.gather(a.ask_all(FAMILIES[:50], chance), b.ask_all(FAMILIES[40:90], chance))
        await both(fleet, a, b, FAMILIES[::9])

        storm = prompts(8, seed=2) + prompts(8, seed=3)
        before = {engine: engine.pool.removals for engine in (a, b)}
        await asyncio.gather(*(engine.ask_all([p[::-1] for p in storm], chance) for engine in (a, b)))
        assert all(engine.pool.removals - before[engine] > BLOCKS // 2 for engine in (a, b)), "no storm"
        await both(fleet, a, b, FAMILIES[4::9])

        a.server.kill()
        a.server.start()
        await asyncio.gather(
            asyncio.to_thread(a.server.wait, time.monotonic() + START_S), fleet.compare(b, FAMILIES[5::15])
        )
        await until(lambda: not fleet.index.match(FAMILIES[0], ["a"]).sources, "the end of what a held")
        await a.ask_all(FAMILIES[:20], chance)
        await both(fleet, a, b, FAMILIES[2::12])
        assert (a.pool.drops, b.pool.drops) == (1, 0)
        assert subscriber.metrics.fleet_skipped_events.value() == 0
    assert fleet.compared > 80
    assert fleet.part > fleet.compared // 5, "too few prompts that were held in part"
    assert a.pool.twins + b.pool.twins > 0, "no block in two copies"


async def both(fleet: Fleet, a: Engine, b: Engine, asked: Sequence[list[int]]) -> None:
    await asyncio.gather(fleet.compare(a, asked), fleet.compare(b, asked))
