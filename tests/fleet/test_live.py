"""Publishers' processes, the subscriber and the index together, against the model that is a dict of dicts."""

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack

import pytest

from cairn.fleet import Event, FleetIndex, Source, Tier
from cairn.fleet.instances import Limits
from cairn.fleet.separation import namespace_digest
from cairn.fleet.subscriber import Subscriber
from tests.fleet.model import Model
from tests.fleet.peers import DEADLINE_S, Publisher
from tests.fleet.told import SALTS, Talker, prompts


class Both:
    """The index and the model, told the same."""

    def __init__(self) -> None:
        self.index, self.model = FleetIndex(4096), Model()
        self.drops = 0

    def apply(self, source: Source, events: Sequence[Event]) -> None:
        self.index.apply(source, events)
        for event in events:
            self.model.apply(source, event)

    def drop(self, source: Source) -> None:
        self.drops += 1
        self.index.drop(source)
        self.model.drop(source)

    def holds(self, source: Source, tokens: Sequence[int]) -> bool:
        return self.index.match(tokens).of(source)[Tier.VRAM] == len(tokens)


def reach(model: Model, source: Source, tokens: Sequence[int], namespace: bytes) -> list[int]:
    """By tier: leading tokens that are there or in a faster one."""
    return model.match(tokens, namespace).get(source, ([], [0, 0, 0, 0]))[1]


async def all_told(talker: Talker, both: Both) -> None:
    """Says a last thing, and again if nobody was listening yet, until the index has it."""
    deadline = time.monotonic() + DEADLINE_S
    for number in range(10_000):
        assert time.monotonic() < deadline, "the last batch does not arrive"
        marked, soon = talker.mark(number), time.monotonic() + 0.3
        while time.monotonic() < soon:
            if both.holds(talker.source, marked):
                return
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_the_index_is_the_model(seed: int) -> None:
    """Stores, removals and clears of five instances, of which batches are lost, connections break and processes die.

    At the end the index holds of each instance what the model holds that was told the same; nothing that the instance
    does not hold; and all that its replay could still tell, which is everything where its buffer is long enough.
    """
    chance, both = random.Random(seed), Both()
    asked = prompts(chance)
    with ExitStack() as stack:
        talkers = []
        for i, (buffer, replay) in enumerate([(10_000, True), (10_000, True), (12, True), (12, True), (12, False)]):
            publisher = stack.enter_context(Publisher(f"w{i}", buffer=buffer, rank=i % 2))
            talkers.append(Talker(publisher, asked, random.Random(f"{seed} {i}"), replay))

        async def run() -> None:
            limits = Limits(check_s=0.3, quiet_s=1.0, replay_s=8.0, lost_s=30.0)
            async with Subscriber(both, [talker.publisher.instance for talker in talkers], limits=limits):
                for _ in range(250):
                    chance.choice(talkers).say_something()
                    if chance.random() < 0.4:
                        await asyncio.sleep(chance.choice([0, 0.001]))
                await asyncio.gather(*(all_told(talker, both) for talker in talkers))

        asyncio.run(run())
        assert both.drops > 0
        found = [compare(talker, both, asked) for talker in talkers]
    assert sum(found) > 20 * len(asked), "next to nothing was held"


def compare(talker: Talker, both: Both, asked: Sequence[Sequence[int]]) -> int:
    """Returns how many tokens were held."""
    source, batches, kept = talker.source, talker.publisher.batches, talker.publisher.kept
    truth, least = talker.model(batches), talker.model(kept if talker.replay else [])
    tokens = 0
    for prompt in asked:
        for salt in set(SALTS):
            namespace = namespace_digest(salt=salt)
            match = both.index.match(prompt, namespace=namespace)
            row = match.reach[match.sources.index(source)].tolist()
            assert row == reach(both.model, source, prompt, namespace)
            most, low = (reach(model, source, prompt, namespace) for model in (truth, least))
            assert all(a <= b <= c for a, b, c in zip(low, row, most, strict=True))
            if talker.replay and len(kept) == len(batches):
                assert row == most
            tokens += row[-1]
    return tokens
