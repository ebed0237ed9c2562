"""What engines say at random, in wire events: few prompts that share prefixes, tiers, salts; and what goes wrong."""

import hashlib
import random
from typing import Any

from cairn.fleet import Source
from cairn.fleet.events import Decoder
from cairn.fleet.metrics import FleetMetrics
from tests.fleet.model import Model
from tests.fleet.peers import Publisher
from tests.fleet.wire_events import cleared, removed, stored

MEDIUMS = ["GPU", "GPU", "GPU", "CPU", "STORAGE"]
SALTS = [None, None, "tenant"]
SIZE = 4


def prompts(chance: random.Random) -> list[list[int]]:
    """They part at a block's end or inside one."""
    base = [chance.randrange(100) for _ in range(10 * SIZE)]
    cuts = [chance.randrange(1, 10 * SIZE) for _ in range(4)]
    return [base, *(base[:cut] + [chance.randrange(100) for _ in range(5 * SIZE)] for cut in cuts)]


class Talker:
    """One publisher and the engine behind it."""

    def __init__(self, publisher: Publisher, asked: list[list[int]], chance: random.Random, replay: bool) -> None:
        self.publisher, self.asked, self.chance, self.replay = publisher, asked, chance, replay
        if not replay:
            publisher.instance = publisher.instance._replace(replay=None)
        self.lives = 0

    @property
    def source(self) -> Source:
        return self.publisher.source

    def model(self, batches: list[bytes]) -> Model:
        """What they leave behind, when they are all that was heard."""
        model, decoder = Model(), Decoder(FleetMetrics())
        for payload in batches:
            batch = decoder.decode(payload)
            for event in batch.events if batch else ():
                model.apply(self.source, event)
        return model

    def say_something(self) -> None:
        dice, lost = self.chance.random(), self.chance.random() < 0.15
        if dice < 0.6:
            self.publisher.publish(*self._some(), lost=lost)
        elif dice < 0.7:
            self.publisher.send(self.chance.randbytes(60), lost=lost)
        elif dice < 0.74:
            for _ in range(40):
                self.publisher.publish(*self._some(), lost=True)
        elif dice < 0.78:
            self.publisher.publish(cleared(), *self._some(), lost=lost)
        elif dice < 0.8:
            self.publisher.kill()
            self.publisher.start()
            self.lives += 1
        elif dice < 0.82:
            self.publisher.do("rebind")

    def mark(self, number: int) -> list[int]:
        """Says, without loss, that a prompt of one block is held that nobody else has; returns the prompt."""
        tokens = [200 + number, 1, 2, 3]
        self.publisher.publish(stored([self._name(None, tuple(tokens))], tokens, SIZE))
        return tokens

    def _some(self) -> list[dict[str, Any]]:
        return [event for _ in range(self.chance.randrange(1, 4)) for event in [self._store(), self._remove()] if event]

    def _store(self) -> dict[str, Any] | None:
        tokens, salt = self.chance.choice(self.asked), self.chance.choice(SALTS)
        count = len(tokens) // SIZE
        names = [self._name(salt, tuple(tokens[: (i + 1) * SIZE])) for i in range(count)]
        first = self.chance.choice([0, 0, self.chance.randrange(count)])
        last = self.chance.randrange(first, count) + 1
        fields: dict[str, Any] = {"medium": self.chance.choice(MEDIUMS), "extra_keys": [None] * (last - first)}
        if first:
            fields["parent_block_hash"] = names[first - 1]
        elif salt:
            fields["extra_keys"][0] = [salt]
        if self.chance.random() < 0.1:  # without tokens: only that they are in this tier too
            return stored(names[first:last], [], 0, medium=fields["medium"])
        return stored(names[first:last], tokens[first * SIZE : last * SIZE], SIZE, **fields)

    def _remove(self) -> dict[str, Any] | None:
        held = self.model(self.publisher.batches).held.get(self.source)
        if not held or self.chance.random() < 0.5:
            return None
        some = self.chance.sample(list(held), min(len(held), self.chance.randrange(1, 4)))
        return removed(some, medium=self.chance.choice([*MEDIUMS, None]))

    def _name(self, salt: str | None, prefix: tuple[int, ...]) -> int:
        """Each process has names of its own."""
        text = repr((self.source, self.lives, salt, prefix))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
